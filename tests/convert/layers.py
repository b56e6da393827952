"""Random layers, and what each format says of one, written out independently of the package's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha.convert import PackedParameters
from mha.packing import PackedLayout

Array = NDArray[Any]
State = dict[str, Array]

#: Formats with grouped heads, with biases that are always or never there, and those that are alike in a pair's round.
GROUPED = {"keras", "flax", "llama", "hf_bart", "megatron", "megatron_v2", "falcon", "falcon_mqa", "phi3"}
ALWAYS_BIASED = {"gpt2", "onnx", "hf_bert", "bloom"}
NEVER_BIASED = {"phi3", "t5"}
#: Only the output has a bias, or it always has one.
ONLY_OUTPUT_BIASED = {"gpt_neo"}
OUTPUT_BIASED = {"gpt_neo", "hf_vit"}
#: All biases or none.
TOGETHER_BIASED = {"torch", "ivy", "keras", "flax", "paddle_nn"}
UNSCALED = {"t5", "gpt_neo"}
NO_OUTPUT = {"onnx"}


def random_layer(
    seed: int = 0, heads: int = 4, kv_heads: int | None = None, width: int = 3, embed_dim: int | None = None,
    bias: bool = True, output: bool = True, dtype: Any = np.float32, scale: float | None = None, **options: Any,
) -> PackedParameters:  # fmt: skip
    """Packed parameters with every element another."""
    embed_dim = heads * width if embed_dim is None else embed_dim
    kv_heads = heads if kv_heads is None else kv_heads
    sizes: dict[str, Any] = {
        "qproj_size": heads * width,
        "kproj_size": kv_heads * width,
        "vproj_size": kv_heads * width,
    }
    sizes |= {"oproj_size": embed_dim if output else 0}
    biases = {f"{x}bias": bias and (x != "o" or output) for x in "qkvo"}
    layout = PackedLayout(embed_dim, heads, num_kv_heads=kv_heads, **sizes | biases | options)
    rng = np.random.default_rng(seed)
    if scale is None and width**-0.5 != layout.scale:
        scale = width**-0.5
    return PackedParameters((rng.standard_normal(layout.length) / 3).astype(dtype), layout, scale=scale)


def for_format(name: str, seed: int = 0, bias: bool = True, **options: Any) -> PackedParameters:
    """A layer that the format can hold."""
    bias = (bias or name in ALWAYS_BIASED) and name not in NEVER_BIASED
    if name in UNSCALED:
        options["scale"] = 1.0
    if name in ONLY_OUTPUT_BIASED:
        bias, options = False, options | {"obias": True}
    elif name in OUTPUT_BIASED:
        options |= {"obias": True}
    return random_layer(seed, bias=bias, output=name not in NO_OUTPUT, **options)


def _heads(x: Array, heads: int) -> Array:
    """(L, heads * width) -> (heads, L, width)"""
    return x.reshape(x.shape[0], heads, -1).transpose(1, 0, 2)


def _torch(x: Array, s: State, h: int) -> tuple[Array, ...]:
    y = np.einsum("le,fe->lf", x, s["in_proj_weight"]) + s.get("in_proj_bias", 0)
    return tuple(_heads(part, h) for part in np.split(y, 3, axis=1))


def _named(q: str, k: str, v: str, by: str = "le,fe->lf") -> Callable[..., Any]:
    def project(x: Array, s: State, h: int) -> tuple[Array, ...]:
        made = [np.einsum(by, x, s[f"{name}.weight"]) + s.get(f"{name}.bias", 0) for name in (q, k, v)]
        width = made[0].shape[1] // h
        return tuple(y.reshape(len(x), -1, width).transpose(1, 0, 2) for y in made)

    return project


def _keras(x: Array, s: State, h: int) -> tuple[Array, ...]:
    made = (np.einsum("le,ehd->lhd", x, s[f"{n}/kernel"]) + s.get(f"{n}/bias", 0) for n in ("query", "key", "value"))
    return tuple(y.transpose(1, 0, 2) for y in made)


def _paddle(x: Array, s: State, h: int) -> tuple[Array, ...]:
    y = np.einsum("le,chde->clhd", x, s["qkv_weight"])
    if "qkv_bias" in s:
        y += s["qkv_bias"][:, None]
    return tuple(part.transpose(1, 0, 2) for part in y)


def _fused(name: str, order: str, by: str = "le,fe->lf") -> Callable[..., Any]:
    """The fused projection cut up; `order` says how its features run: c is query, key, value, h heads, d a head's."""

    def project(x: Array, s: State, h: int) -> tuple[Array, ...]:
        y = np.einsum(by, x, s[f"{name}weight"]) + s.get(f"{name}bias", 0)
        sizes = {"c": 3, "h": h, "d": y.shape[1] // (3 * h)}
        y = y.reshape(len(x), *(sizes[axis] for axis in order))
        return tuple(np.einsum(f"l{order}->chld", y))

    return project


def _grouped(name: str, groups: bool = True) -> Callable[..., Any]:
    def project(x: Array, s: State, h: int, kv: int) -> tuple[Array, ...]:
        y = x @ s[f"{name}weight"].T + s.get(f"{name}bias", 0)
        if groups:
            y = y.reshape(len(x), kv, h // kv + 2, -1)
            q = y[:, :, :-2].reshape(len(x), h, -1)
            return q.transpose(1, 0, 2), y[:, :, -2].transpose(1, 0, 2), y[:, :, -1].transpose(1, 0, 2)
        y = y.reshape(len(x), h + 2 * kv, -1).transpose(1, 0, 2)
        return y[:h], y[h : h + kv], y[h + kv :]

    return project


def _onnx(x: Array, s: State, h: int) -> tuple[Array, ...]:
    return tuple(_heads(part, h) for part in np.split(x @ s["weights"] + s["bias"], 3, axis=1))


#: Heads of query, key and value from the raw tensors.
PROJECTIONS: dict[str, Callable[..., Any]] = {
    "torch": _torch,
    "paddle": _paddle,
    "paddle_flat": lambda x, s, h: tuple(
        _heads(y, h) for y in np.split(x @ s["qkv_weight"] + s.get("qkv_bias", 0), 3, 1)
    ),
    "ivy": lambda x, s, h: _torch(
        x, {"in_proj_weight": s["in_proj_weights"]} | {n: y for n, y in s.items() if n == "in_proj_bias"}, h
    ),
    "keras": _keras,
    "flax": _keras,
    "hf_bert": _named("self.query", "self.key", "self.value"),
    "hf_vit": _named("attention.query", "attention.key", "attention.value"),
    "hf_bart": _named("q_proj", "k_proj", "v_proj"),
    "gpt_neo": _named("q_proj", "k_proj", "v_proj"),
    "paddle_nn": _named("q_proj", "k_proj", "v_proj", by="le,ef->lf"),
    "timm": _fused("qkv.", "chd"),
    "gpt2": _fused("c_attn.", "chd", "le,ef->lf"),
    "llama": _named("q_proj", "k_proj", "v_proj"),
    "gpt_neox": _fused("query_key_value.", "hcd"),
    "bloom": _fused("query_key_value.", "hcd"),
    "megatron": _grouped("linear_qkv."),
    "megatron_v2": _grouped("query_key_value."),
    "megatron_v1": _fused("query_key_value.", "hdc"),
    "megatron_v0": _fused("query_key_value.", "chd"),
    "falcon": _grouped("query_key_value."),
    "falcon_mqa": _grouped("query_key_value.", groups=False),
    "phi3": _grouped("qkv_proj.", groups=False),
    "t5": _named("q", "k", "v"),
    "onnx": _onnx,
}
#: Name of the output weight and bias, and whether it is (in, out).
OUTPUTS: dict[str, tuple[str, str, bool]] = {
    "torch": ("out_proj.weight", "out_proj.bias", False), "paddle": ("linear_weight", "linear_bias", True),
    "paddle_flat": ("linear_weight", "linear_bias", True), "ivy": ("out_proj_weights", "out_proj_bias", False),
    "keras": ("attention_output/kernel", "attention_output/bias", True), "flax": ("out/kernel", "out/bias", True),
    "hf_bert": ("output.dense.weight", "output.dense.bias", False),
    "hf_vit": ("output.dense.weight", "output.dense.bias", False),
    "hf_bart": ("out_proj.weight", "out_proj.bias", False), "gpt_neo": ("out_proj.weight", "out_proj.bias", False),
    "paddle_nn": ("out_proj.weight", "out_proj.bias", True), "timm": ("proj.weight", "proj.bias", False),
    "gpt2": ("c_proj.weight", "c_proj.bias", True), "llama": ("o_proj.weight", "o_proj.bias", False),
    "megatron": ("linear_proj.weight", "linear_proj.bias", False), "phi3": ("o_proj.weight", "", False),
    "t5": ("o.weight", "", False),
}  # fmt: skip
_DENSE = ("dense.weight", "dense.bias", False)


def answer(name: str, state: State, x: Array, heads: int, kv_heads: int) -> Array:
    """The layer's output for x (L, E), from the raw tensors in float64."""
    state = {key: y.astype(np.float64) for key, y in state.items()}
    grouped = name in ("megatron", "megatron_v2", "falcon", "falcon_mqa", "phi3")
    q, k, v = PROJECTIONS[name](x, state, heads, *((kv_heads,) if grouped else ()))
    k, v = (np.repeat(y, heads // len(y), axis=0) for y in (k, v))
    scores = np.einsum("hld,hsd->hls", q, k) * (1.0 if name in UNSCALED else q.shape[-1] ** -0.5)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    context = np.einsum("hls,hsd->lhd", weights / weights.sum(-1, keepdims=True), v).reshape(len(x), -1)
    if name in NO_OUTPUT:
        return context
    weight, bias, in_out = OUTPUTS.get(name, _DENSE)
    w = state[weight].reshape(context.shape[1], -1) if in_out else state[weight].T
    return context @ w + state.get(bias, 0)
