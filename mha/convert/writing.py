"""`Layer` -> a foreign format's tensors, or the reasons why it cannot say the layer."""

from __future__ import annotations

import math
import warnings
from typing import Any

from numpy.typing import NDArray

from mha.convert.axes import Heads
from mha.convert.formats import Format, Tensor
from mha.convert.parameters import WORDS, Layer
from mha.optional import array_module

Array = NDArray[Any]

#: By whether the format has all biases as soon as it has one.
_WHY = {True: "has all biases or none", False: "always has biases"}


def reasons_against(one: Format, layer: Layer) -> list[str]:
    """Why the format cannot say the layer: each property that it has no place for."""
    reasons, held = [], {letter for tensor in one.weights for letter in tensor.holds}
    projections = layer.projections
    reasons += [f"there is no {WORDS[letter]} projection" for letter in sorted(held - projections.keys())]
    reasons += [f"it has no {WORDS[letter]} projection" for letter in sorted(projections.keys() - held)]
    if layer.num_kv_heads != layer.num_heads and not one.grouped:
        reasons.append(f"num_kv_heads {layer.num_kv_heads} is not num_heads {layer.num_heads}")
    if not set("qkv") <= projections.keys():
        return reasons
    width = projections["q"].weight.shape[0]
    if one.square:
        reasons += [
            f"{letter}proj_size {projections[letter].weight.shape[1]} is not embed_dim {width}"
            for letter in "qkv"
            if projections[letter].weight.shape[1] != width
        ]
    if any(len(tensor.holds) > 1 for tensor in one.weights):
        reasons += [
            f"{letter}dim {projections[letter].weight.shape[0]} is not embed_dim {width}"
            for letter in "kv"
            if projections[letter].weight.shape[0] != width
        ]
        dims = layer.head_dims
        if dims["v"] != dims["q"]:
            reasons.append(f"value heads are {dims['v']} wide and query heads {dims['q']}")
    usual = layer.head_dims["q"] ** -0.5 if one.scale is None else one.scale
    if not math.isclose(layer.own_scale, usual, rel_tol=1e-6):
        reasons.append(f"the scale is {layer.own_scale:g}, there always {usual:g}")
    if layer.bias_k is not None and not one.appended:
        reasons.append("bias_k and bias_v have no place")
    return reasons + _reasons_of_biases(one, layer)


def _reasons_of_biases(one: Format, layer: Layer) -> list[str]:
    biased = {letter for letter, projection in layer.projections.items() if projection.bias is not None}
    tensors = [tensor for tensor in one.tensors if tensor.is_bias]
    reasons = []
    nowhere = biased - {letter for tensor in tensors for letter in tensor.holds}
    if nowhere:
        reasons.append(f"biases have no place ({', '.join(f'{x}bias' for x in sorted(nowhere))})")
    for tensor in tensors:
        flags = {letter: letter in biased for letter in tensor.holds}
        if not tensor.required and len(set(flags.values())) > 1:
            listed = ", ".join(f"{letter}bias {flag}" for letter, flag in flags.items())
            reasons.append(f"only some have a bias ({listed})")
    return reasons


def write(one: Format, layer: Layer, prefix: str) -> dict[str, Array]:
    """The layer's tensors by name; views of its arrays where the format's axes allow it.

    Raises
    ------
    ValueError
        With every property that the format has no place for.
    """
    reasons = reasons_against(one, layer)
    if reasons:
        raise ValueError(
            f"{one.title} cannot hold this layer: {'; '.join(reasons)}. Where a piece is absent, pack an identity "
            "weight or a zero bias in its place; the rest has no equivalent."
        )
    state: dict[str, Array] = {}
    all_biases = one.all_biases and any(projection.bias is not None for projection in layer.projections.values())
    appended = {"bias_k": layer.bias_k, "bias_v": layer.bias_v}
    filled: list[str] = []
    for tensor in one.tensors:
        if tensor.holds == "o":
            state |= {name: x for name, x in appended.items() if x is not None and name not in state}
        absent = [letter for letter in tensor.holds if tensor.is_bias and layer.projections[letter].bias is None]
        if len(absent) == len(tensor.holds) and not (tensor.required or all_biases):
            continue
        filled += absent
        state[tensor.name] = _laid_out(one, tensor, layer)
    if filled:
        words = ", ".join(WORDS[letter] for letter in filled)
        warnings.warn(f"{one.title} {_WHY[all_biases]}: zeros stand for those of {words}.", stacklevel=3)
    return {prefix + name: x for name, x in state.items()}


def _laid_out(one: Format, tensor: Tensor, layer: Layer) -> Array:
    heads = Heads(layer.num_heads, layer.num_kv_heads)
    parts = [_part(tensor, layer, letter) for letter in tensor.holds]
    if len(parts) == 1:
        return tensor.axes.laid_out(parts[0], heads.key if tensor.holds in "kv" else heads.query)
    fused = any(other.holds == tensor.holds for other in one.weights)
    joined = one.order.join(parts, heads) if fused else array_module(*parts).concatenate(parts, axis=-1)
    made: Array = array_module(joined).ascontiguousarray(tensor.axes.laid_out(joined, heads.query))
    return made


def _part(tensor: Tensor, layer: Layer, letter: str) -> Array:
    weight, bias, _ = layer.projections[letter]
    if not tensor.is_bias:
        return weight
    return array_module(weight).zeros(weight.shape[1], weight.dtype) if bias is None else bias
