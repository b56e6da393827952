"""PyTorch's parameter format, which R torch and Ivy share: weights (out-features, in-features), query, key and value
stacked in one matrix or apart. A call of such a layer becomes a `LayerCall`; nothing is copied or transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha import front, layer
from mha.mask_checks import Sizes
from mha.masks import float_masks, for_multi_head_attention
from mha.optional import array_module
from mha.problem import Dropout, check_dtypes, checked_probability, shapes_of, usable
from mha.random import next_state

Array = NDArray[Any]

#: Parameters by the names used here; those of a system are translated to them.
PARAMETERS = ("in_weight", "q_weight", "k_weight", "v_weight", "in_bias", "out_weight", "out_bias", "bias_k", "bias_v",
              "static_k", "static_v")  # fmt: skip


@dataclass(eq=False)
class StackedCall:
    """One call, validated. Arrays are the caller's, by `PARAMETERS` and as query, key, value, masks."""

    call: layer.LayerCall
    given: dict[str, Array]
    batched: bool
    length_first: bool

    @classmethod
    def build(
        cls,
        query: Array,
        key: Array,
        value: Array,
        parameters: Mapping[str, Array | None],
        num_heads: int,
        *,
        embed_dim: int | None = None,
        attn_mask: Array | None = None,
        key_padding_mask: Array | None = None,
        is_causal: bool = False,
        add_zero_attn: bool = False,
        dropout_p: float = 0.0,
        training: bool = False,
        need_weights: bool = True,
        average: bool = True,
        scale: float | None = None,
        length_first: bool = False,
    ) -> StackedCall:
        """Check a call. `embed_dim` is the query's width where the caller states it."""
        inputs = {"query": query, "key": key, "value": value}
        held = {name: x for name in PARAMETERS if (x := parameters.get(name)) is not None}
        xp = array_module(*inputs.values(), *held.values())
        check_dtypes(inputs | held)
        held = {name: usable(x, xp) for name, x in held.items()}
        axes = "(length, N, width)" if length_first else "(N, length, width)"
        q, k, v = (_batch_first(x, length_first) for x in inputs.values())
        front.check_inputs(q, k, v, q.shape[-1] if embed_dim is None else embed_dim, axes)
        batched = query.ndim == 3
        q, k, v = (usable(x if batched else x[None], xp) for x in (q, k, v))
        weights = views(held)
        widths = _head_widths(inputs, weights, held, num_heads)
        heads = _ready_heads(q, k, v, weights, held, num_heads, widths)
        keys = heads["key"].shape[2] if "key" in heads else k.shape[1]
        bias_rows = None
        if "bias_k" in held or "bias_v" in held:
            bias_rows = _bias_rows(held, widths)
        sizes = Sizes((q.shape[0],), num_heads, q.shape[1], keys)
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        spec = for_multi_head_attention(
            attn_mask, key_padding_mask, batch=q.shape[0], heads=num_heads, queries=q.shape[1], keys=keys,
            dtype=q.dtype, is_causal=is_causal, extra=(bias_rows is not None) + bool(add_zero_attn),
            batched=batched, xp=xp,
        )  # fmt: skip
        p = checked_probability("dropout_p", dropout_p)
        call = layer.LayerCall(
            q, k, v, weights, num_heads, num_heads, mask=spec, scale=scale,
            dropout=Dropout(p, next_state()) if training and p > 0 else None,
            bias_rows=bias_rows, zero_row=bool(add_zero_attn), heads=heads, need_weights=bool(need_weights),
            average=bool(average), float_masks=float_masks(**masks, sizes=sizes),
        )  # fmt: skip
        given = inputs | held | {name: mask for name, mask in masks.items() if mask is not None}
        return cls(call, given, batched, length_first)

    def forward(self) -> tuple[Array, Array | None]:
        """Output in the query's axes; weights (N, H, L, T) or averaged (N, L, T), without N if unbatched."""
        output, weights, _ = layer.forward(self.call)
        if weights is not None and not self.batched:
            weights = weights[0]
        return self._outward(output), weights

    def backward(
        self, grad_output: Array, grad_weights: Array | None = None, mask_gradients: bool = False
    ) -> dict[str, Array]:
        """Gradients by the names of `given`, each in that array's own shape; of float masks only on request."""
        call, given = self.call, self.given
        batch, queries, width = call.output_shape
        shape: tuple[int, ...] = (queries, width)
        if self.batched:
            shape = (queries, batch, width) if self.length_first else (batch, queries, width)
        grad = front.gradient_like("grad_output", grad_output, shape, call.query)
        grad = _batch_first(grad, self.length_first) if self.batched else grad[None]
        full = call.weights_shape
        grad_weights = front.weights_gradient(
            "grad_weights", grad_weights, full[not self.batched :], full, call.need_weights
        )
        of_parameters = {name: call.xp.zeros(given[name].shape, given[name].dtype) for name in PARAMETERS[:7]
                         if name in given}  # fmt: skip
        made = layer.backward(call, grad, grad_weights, views(of_parameters), mask_gradients)
        gradients = of_parameters | made.masks
        for name, x in zip(("query", "key", "value"), made[:3], strict=True):
            gradients[name] = self._input_gradient(name, x, made.heads)
        for letter, name in (("k", "key"), ("v", "value")):
            if f"static_{letter}" in given:
                gradients[f"static_{letter}"] = made.heads[name]
        if made.bias_rows is not None:
            gradients["bias_k"], gradients["bias_v"] = made.bias_rows
        return {name: x.reshape(given[name].shape) for name, x in gradients.items()}

    def _input_gradient(self, name: str, gradient: Array | None, heads: dict[str, Array]) -> Array:
        x = self.given[name]
        if gradient is not None:
            return self._outward(gradient)
        if f"static_{name[0]}" in self.given:
            zeros: Array = self.call.xp.zeros(x.shape, x.dtype)
            return zeros
        batch, count, length, width = heads[name].shape
        return self._outward(heads[name].swapaxes(1, 2).reshape(batch, length, count * width))

    def _outward(self, x: Array) -> Array:
        """(N, length, width) -> the caller's axes."""
        return _batch_first(x, self.length_first) if self.batched else x[0]


def views(parameters: Mapping[str, Array]) -> dict[str, Array]:
    """The projections as a layer takes them, (in-features, out-features), and their biases.

    Raises
    ------
    ValueError
        If the stacked ones cannot be divided by three.
    """
    made: dict[str, Array] = {}
    rows = [0, 0, 0]
    if "in_weight" in parameters:
        stacked = parameters["in_weight"]
        if stacked.ndim != 2 or stacked.shape[0] % 3:
            raise ValueError(
                f"the stacked input weight has shape {stacked.shape}, not (3 * E, width). "
                "Its rows are those of query, key and value."
            )
        rows = [stacked.shape[0] // 3] * 3
        made = {f"{x}_weight": stacked[i * rows[0] : (i + 1) * rows[0]].T for i, x in enumerate("qkv")}
    elif "q_weight" in parameters:
        made = {f"{x}_weight": parameters[f"{x}_weight"].T for x in "qkv"}
        rows = [made[f"{x}_weight"].shape[-1] for x in "qkv"]
    if "in_bias" in parameters and made:
        bias = parameters["in_bias"]
        if bias.shape != (sum(rows),):
            raise ValueError(
                f"the input bias has shape {bias.shape}, the input weights {rows} rows: it must be ({sum(rows)},). "
                "Stack the biases of query, key and value."
            )
        start = 0
        for x, count in zip("qkv", rows, strict=True):
            made[f"{x}_bias"] = bias[start : start + count]
            start += count
    if "out_weight" in parameters:
        made["o_weight"] = parameters["out_weight"].T
        if "out_bias" in parameters:
            made["o_bias"] = parameters["out_bias"]
    return made


def _batch_first(x: Array, length_first: bool) -> Array:
    return x.swapaxes(0, 1) if length_first and x.ndim == 3 else x


def _head_widths(
    inputs: dict[str, Array], weights: dict[str, Array], held: dict[str, Array], num_heads: int
) -> list[int]:
    """Projected widths of query, key and value; every weight and bias fits what it is applied to."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, (int, np.integer)):
        raise TypeError(f"num_heads is {num_heads!r}, not an integer. Pass the number of heads.")
    widths = []
    for name, x in inputs.items():
        weight = weights.get(f"{name[0]}_weight")
        if weight is not None and (weight.ndim != 2 or weight.shape[0] != x.shape[-1]):
            raise ValueError(
                f"the weight of {name} has shape {weight.T.shape}, but {name} {x.shape}. "
                "A weight is (out-features, in-features)."
            )
        widths.append(x.shape[-1] if weight is None else weight.shape[1])
    listed = f"query, key and value are {widths} wide before they are divided into num_heads {num_heads} heads"
    if num_heads < 1 or any(width < 1 or width % num_heads for width in widths):
        raise ValueError(f"{listed}; each width must be divisible by it. Check num_heads and the weights.")
    if widths[0] != widths[1] and "static_k" not in held:
        raise ValueError(f"{listed}; those of query and key must be equal. {shapes_of(**inputs, **held)}.")
    if "static_v" in held and held["static_v"].ndim == 3:
        widths[2] = held["static_v"].shape[2] * num_heads
    weight, bias = weights.get("o_weight"), weights.get("o_bias")
    if weight is not None and (weight.ndim != 2 or weight.shape[0] != widths[2]):
        raise ValueError(
            f"the output weight has shape {weight.T.shape}, but the heads side by side are {widths[2]} wide. "
            "It is (out-features, that width)."
        )
    if weight is not None and bias is not None and bias.shape != (weight.shape[1],):
        raise ValueError(
            f"the output bias has shape {bias.shape}, the output weight {weight.T.shape}: the bias must be "
            f"({weight.shape[1]},). There is one for each row of the weight."
        )
    return widths


def _ready_heads(
    query: Array, key: Array, value: Array, weights: dict[str, Array], held: dict[str, Array], num_heads: int,
    widths: list[int],
) -> dict[str, Array]:  # fmt: skip
    """Static keys and values, and inputs without a projection: the width divided into heads."""
    heads = {}
    for name, x in (("query", query), ("key", key), ("value", value)):
        if f"static_{name[0]}" in held:
            heads[name] = _static_heads(held, name, query.shape[0], num_heads, widths)
        elif f"{name[0]}_weight" not in weights:
            heads[name] = x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads).swapaxes(1, 2)
    return heads


def _static_heads(held: dict[str, Array], name: str, batch: int, num_heads: int, widths: list[int]) -> Array:
    """(N*H, S', D) as (N, H, S', D)."""
    static = held[f"static_{name[0]}"]
    rows, width = batch * num_heads, widths["qkv".index(name[0])] // num_heads
    if name == "key":
        width = widths[0] // num_heads
    if static.ndim != 3 or static.shape[0] != rows or static.shape[2] != width:
        raise ValueError(
            f"static_{name[0]} has shape {static.shape} where (N*H, length, head size) = ({rows}, length, {width}) "
            "is expected. Row n*H + h is head h of sample n."
        )
    for letter in "kv":
        if f"bias_{letter}" in held:
            raise ValueError(
                f"bias_{letter} {held[f'bias_{letter}'].shape} cannot be appended beside static_{name[0]} "
                f"{static.shape}. Leave one of them out."
            )
    return static.reshape(batch, num_heads, *static.shape[1:])


def _bias_rows(held: dict[str, Array], widths: list[int]) -> tuple[Array, Array] | None:
    """bias_k and bias_v as rows (1, 1, E); given as such or as (E,)."""
    rows = {name: held[name] if held[name].ndim != 1 else held[name][None, None] for name in ("bias_k", "bias_v")
            if name in held}  # fmt: skip
    return front.check_bias_rows(rows.get("bias_k"), rows.get("bias_v"), widths[1], widths[2])
