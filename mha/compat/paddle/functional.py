"""``paddle.incubate.nn.functional.fused_multi_head_attention``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha import front, layer
from mha.compat.differentiable import Backward, primal, refuse_grad_weights
from mha.dispatch import backend_of
from mha.masks import for_scaled_dot_product
from mha.optional import array_module
from mha.problem import COMPUTING, Dropout, Norm, check_dtypes, shapes_of, usable
from mha.random import DropoutState

Array = NDArray[Any]

_MODES = ("upscale_in_train", "downscale_in_infer")
_WEIGHTS = ("qkv_weight", "qkv_bias", "linear_weight", "linear_bias")
_NORMS = {True: ("pre_ln_scale", "pre_ln_bias", "pre_ln_epsilon"), False: ("ln_scale", "ln_bias", "ln_epsilon")}


def fused_multi_head_attention_vjp(
    x: Array,
    qkv_weight: Array,
    linear_weight: Array,
    pre_layer_norm: bool = False,
    pre_ln_scale: Array | None = None,
    pre_ln_bias: Array | None = None,
    ln_scale: Array | None = None,
    ln_bias: Array | None = None,
    pre_ln_epsilon: float = 1e-05,
    qkv_bias: Array | None = None,
    linear_bias: Array | None = None,
    cache_kv: Array | None = None,
    attn_mask: Array | None = None,
    dropout_rate: float = 0.5,
    attn_dropout_rate: float = 0.5,
    ln_epsilon: float = 1e-05,
    training: bool = True,
    mode: str = "upscale_in_train",
    ring_id: int = -1,
    add_residual: bool = True,
    num_heads: int = -1,
    transpose_qkv_wb: bool = False,
    name: str | None = None,
) -> tuple[Any, Backward]:
    """Self-attention with layer norm before or after, two dropouts and a residual link.

    ``h = norm(x)`` if `pre_layer_norm` else ``x``; ``y = dropout(attention(h) @ linear_weight + linear_bias)``;
    ``x + y`` with `pre_layer_norm`, else ``norm(x + y)``.

    Parameters
    ----------
    x : (B, S, E) array
        float16, bfloat16, float32 or float64. Query, key, value and residual.
    qkv_weight : (3, H, D, E) array
        Query, key, value. With `transpose_qkv_wb` (E, 3*H*D), its columns query, key, value, each by heads.
    linear_weight : (H*D, E) array
    pre_layer_norm : bool
        Norm of the input, by `pre_ln_scale`, `pre_ln_bias`, `pre_ln_epsilon`; else of the result, by `ln_scale`,
        `ln_bias`, `ln_epsilon`. A missing scale is 1, a missing bias 0; the other norm's are not looked at.
    pre_ln_scale, pre_ln_bias, ln_scale, ln_bias : (E,) arrays, optional
        Of x's dtype; with half precision float32 too.
    qkv_bias : (3, H, D) array, optional
        With `transpose_qkv_wb` (3*H*D,).
    linear_bias : (E,) array, optional
    cache_kv : (2, B, H, C, D) array, optional
        Earlier keys and values, before the new ones; the grown cache is returned too.
    attn_mask : array, optional
        Broadcastable to (B, H, S, C + S). float: added to the scores. bool or integers: True or non-zero = attend.
    dropout_rate, attn_dropout_rate : float
        Of the output and of the attention weights: 0.5 each unless given.
    training, mode : bool, str
        "upscale_in_train": kept values times 1 / (1 - p) in training, nothing else. "downscale_in_infer": kept values
        as they are in training, times 1 - p else. For both dropouts.
    ring_id : int
        -1: no tensor parallelism.
    add_residual : bool
        Only False with `pre_layer_norm`.
    num_heads : int
        H, with `transpose_qkv_wb`.
    name : str, optional
        Has no effect.

    Returns
    -------
    output : (B, S, E) array
    cache_kv_out : (2, B, H, C + S, D) array, if `cache_kv` is given
        New memory.

    Raises
    ------
    ValueError
        For shapes, sizes, modes and flags that do not fit; the message names them.
    TypeError
        For dtypes and array libraries that differ.

    Notes
    -----
    After PaddlePaddle 3.3, its GPU operator. There an output dropout of 1 drops in evaluation too, masks must be
    floats, the gradient of `linear_bias` ignores the dropout, and gradients with a cache are wrong.
    """
    arguments = dict(locals())
    call = _Call.build(arguments)
    output, _, cache = layer.forward(call.layer)

    def backward(
        grad_output: Array, grad_weights: Array | None = None, mask_gradients: bool = False
    ) -> dict[str, Array]:
        refuse_grad_weights(grad_weights)
        return call.backward(grad_output, mask_gradients)

    return output if cache is None else (output, cache), backward


fused_multi_head_attention = primal(fused_multi_head_attention_vjp)


@dataclass(eq=False)
class _Call:
    """One call, validated."""

    layer: layer.LayerCall
    #: The arguments that are arrays.
    given: dict[str, Array]
    #: The norm before, None if it is behind.
    pre_norm: Norm | None
    transposed: bool
    add_residual: bool

    @classmethod
    def build(cls, p: dict[str, Any]) -> _Call:
        given = {name: x for name, x in p.items() if hasattr(x, "shape")}
        pre = bool(p["pre_layer_norm"])
        _check_flags(p)
        xp = array_module(*given.values())
        check_dtypes({name: given[name] for name in ("x", *_WEIGHTS, "cache_kv") if name in given})
        given = {name: usable(x, xp) if name in _WEIGHTS else x for name, x in given.items()}
        heads = _check_shapes(p)
        norm = _norm(p, *_NORMS[pre])
        x = usable(p["x"], xp)
        batch, queries, _ = x.shape
        keys = queries + (0 if p["cache_kv"] is None else p["cache_kv"].shape[3])
        mask = p["attn_mask"]
        if mask is not None and mask.dtype.kind in "iu":
            mask = mask != 0
        if mask is not None:
            mask = mask[(None,) * (4 - mask.ndim)]
        spec = for_scaled_dot_product(
            mask, batch_shape=(batch,), heads=heads, queries=queries, keys=keys, dtype=x.dtype, xp=xp
        )
        rates = p["attn_dropout_rate"], p["dropout_rate"]
        drops = front.dropouts(("attn_dropout_rate", "dropout_rate"), *rates, bool(p["training"]))
        if p["mode"] == "downscale_in_infer":
            drops = tuple(_downscaled(drop, rate) for drop, rate in zip(drops, rates, strict=True))  # type: ignore[assignment]
        h = backend_of(x).residual_norm(x, norm=norm)[0] if pre else x
        cache = None if p["cache_kv"] is None else usable(p["cache_kv"], xp)
        call = layer.LayerCall(
            h, h, h, _views(given, bool(p["transpose_qkv_wb"])), heads, heads, mask=spec,
            dropout=drops[0], output_dropout=drops[1], cache=cache, residual=x if p["add_residual"] else None,
            norm=None if pre else norm,
            float_masks={} if mask is None or mask.dtype == np.bool_ else {"attn_mask": mask},
        )  # fmt: skip
        return cls(call, given, norm if pre else None, bool(p["transpose_qkv_wb"]), bool(p["add_residual"]))

    def backward(self, grad_output: Array, mask_gradients: bool) -> dict[str, Array]:
        """Gradients by parameter, each in its shape and dtype."""
        call, given = self.layer, self.given
        grad = front.gradient_like("grad_output", grad_output, call.output_shape, call.query)
        made_of = {name: call.xp.zeros(given[name].shape, given[name].dtype) for name in _WEIGHTS if name in given}
        made = layer.backward(call, grad, None, _views(made_of, self.transposed), mask_gradients)
        assert made.query is not None
        of_x, of_norm = made.query + made.key + made.value, made.norm
        if self.pre_norm is not None:
            backend = backend_of(call.query)
            of_x, _, *sums = backend.residual_norm_backward(of_x, usable(given["x"], call.xp), self.pre_norm)
            of_norm = sums[0], sums[1]
        if self.add_residual:
            of_x = of_x + made.residual
        assert of_norm is not None
        names = _NORMS[self.pre_norm is not None][:2]
        made_of |= {name: x.astype(given[name].dtype) for name, x in zip(names, of_norm, strict=True) if name in given}
        if made.cache is not None:
            made_of["cache_kv"] = made.cache
        if "attn_mask" in made.masks:
            made_of["attn_mask"] = made.masks["attn_mask"].reshape(given["attn_mask"].shape)
        return {"x": of_x} | made_of


def _views(p: dict[str, Array], transposed: bool) -> dict[str, Array]:
    """The projections as a layer takes them, (in-features, out-features), and their biases."""
    weight, bias = p["qkv_weight"], p.get("qkv_bias")
    made = {"o_weight": p["linear_weight"]}
    if "linear_bias" in p:
        made["o_bias"] = p["linear_bias"]
    width = weight.shape[1] // 3 if transposed else weight.shape[1] * weight.shape[2]
    flat = None if bias is None else bias.reshape(3 * width)
    for i, letter in enumerate("qkv"):
        part = slice(i * width, (i + 1) * width)
        made[f"{letter}_weight"] = weight[:, part] if transposed else weight[i].reshape(width, weight.shape[3]).T
        if flat is not None:
            made[f"{letter}_bias"] = flat[part]
    return made


def _downscaled(drop: Dropout | None, rate: float) -> Dropout | None:
    """In training kept values stay as they are; else everything is multiplied by 1 - rate."""
    if drop is not None:
        return replace(drop, kept=1.0)
    return Dropout(0.0, DropoutState(0, 0), kept=1.0 - rate) if rate > 0 else None


def _check_flags(p: dict[str, Any]) -> None:
    if p["mode"] not in _MODES:
        raise ValueError(f"mode is {p['mode']!r}, neither {_MODES[0]!r} nor {_MODES[1]!r}. Choose one of them.")
    if p["ring_id"] != -1:
        raise ValueError(f"ring_id is {p['ring_id']}, for which no communicator is registered. Leave it at -1.")
    if not p["add_residual"] and not p["pre_layer_norm"]:
        raise ValueError(
            "add_residual=False with pre_layer_norm=False: the norm is of the residual sum. Set one of them."
        )


def _check_shapes(p: dict[str, Any]) -> int:
    """H; every array has the shape that it and the others give it."""
    x, weight, transposed, heads = p["x"], p["qkv_weight"], p["transpose_qkv_wb"], p["num_heads"]
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}, not three axes (B, S, E). Add the batch with x[None].")
    width = x.shape[2]
    if transposed:
        if heads < 1:
            raise ValueError(f"num_heads is {heads} with transpose_qkv_wb=True. Give the number of heads.")
        if weight.ndim != 2 or weight.shape[0] != width or weight.shape[1] % (3 * heads):
            raise ValueError(
                f"qkv_weight has shape {weight.shape}, but with x {x.shape}, transpose_qkv_wb=True and num_heads "
                f"{heads} it must be (E, 3 * num_heads * D), E = {width}."
            )
        head_dim = weight.shape[1] // 3 // heads
    else:
        if weight.ndim != 4 or weight.shape[0] != 3 or weight.shape[3] != width:
            raise ValueError(
                f"qkv_weight has shape {weight.shape}, but with x {x.shape} it must be (3, H, D, E), E = {width}. "
                "For (E, 3 * H * D) set transpose_qkv_wb and num_heads."
            )
        heads, head_dim = weight.shape[1:3]
    inner = heads * head_dim
    expected: dict[str, tuple[int, ...]] = {
        "linear_weight": (inner, width), "linear_bias": (width,),
        "qkv_bias": (3 * inner,) if transposed else (3, heads, head_dim),
    }  # fmt: skip
    cache = p["cache_kv"]
    if cache is not None:
        length = cache.shape[3] if cache.ndim == 5 else 0
        expected["cache_kv"] = (2, x.shape[0], heads, length, head_dim)
    for name, shape in expected.items():
        if p[name] is not None and p[name].shape != shape:
            shapes = shapes_of(**{n: p[n] for n in ("x", "qkv_weight", name)})
            raise ValueError(f"{shapes}: {name} must be {shape}, for {heads} heads of {head_dim}. Check its axes.")
    if not p["add_residual"] or p["linear_weight"].shape[1] == width:
        return int(heads)
    raise ValueError(f"linear_weight {p['linear_weight'].shape} gives no residual sum with x {x.shape}.")


def _norm(p: dict[str, Any], scale: str, bias: str, epsilon: str) -> Norm:
    """The norm with these parameters."""
    x = p["x"]
    for name in (scale, bias):
        own = p[name]
        if own is None:
            continue
        if own.shape != x.shape[2:]:
            raise ValueError(f"{name} has shape {own.shape}, but with x {x.shape} it must be {x.shape[2:]}.")
        if own.dtype not in (x.dtype, COMPUTING[x.dtype]):
            raise TypeError(
                f"{name} is {own.dtype}, but with x of dtype {x.dtype} it must be that or {COMPUTING[x.dtype]}. "
                "Convert it with astype."
            )
    if not p[epsilon] >= 0:
        raise ValueError(f"{epsilon} is {p[epsilon]}. Pass a small positive number.")
    return Norm(p[scale], p[bias], float(p[epsilon]))
