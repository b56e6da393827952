"""Foreign attention weights to `PackedParameters` and back: pure functions that copy, and never guess a layout.

Square matrices do not show their orientation and fused ones do not show their order, so names decide, and names that
a format does not have are refused rather than dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha.optional import array_module, as_array
from mha.packing import PackedLayout

_TORCH_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_TORCH_MARKS = ("in_proj_weight", "q_proj_weight")
_TORCH_OPTIONAL = ("in_proj_bias", "bias_k", "bias_v", "out_proj.bias")
_BERT_LINEARS = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}


class PackedParameters(NamedTuple):
    """The parameters of one attention layer in this package's own format.

    Attributes
    ----------
    io_weight_bias : array, shape (layout.length,)
        All projections and biases, in the order that `layout` describes.
    layout : PackedLayout
    bias_k, bias_v : array, shape (1, 1, kproj_size) and (1, 1, vproj_size), optional
        One extra, already projected key and value; both or neither.
    """

    io_weight_bias: NDArray[Any]
    layout: PackedLayout
    bias_k: NDArray[Any] | None = None
    bias_v: NDArray[Any] | None = None


class _Linear(NamedTuple):
    """A projection the way torch has it, ``x @ weight.T + bias``; `name` is what its owner calls it."""

    name: str
    weight: NDArray[Any]
    bias: NDArray[Any] | None


def from_torch(
    state_dict: Mapping[str, Any], num_heads: int, prefix: str = "", *, num_kv_heads: int | None = None
) -> PackedParameters:
    """Pack the parameters of a ``torch.nn.MultiheadAttention``.

    Parameters
    ----------
    state_dict : mapping of str to array or torch tensor
        ``in_proj_weight``, or ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``; ``out_proj.weight``; and
        optionally ``in_proj_bias``, ``out_proj.bias``, ``bias_k`` with ``bias_v``. None counts as absent. Tensors, on
        whatever device, are read into NumPy arrays.
    num_heads : int
        The state does not tell it.
    prefix : str
        What stands before these names, for instance ``"encoder.layers.0.self_attn."``; other keys are not looked at.
    num_kv_heads : int, optional
        Key heads, for a layer with torch's names but grouped heads.

    Returns
    -------
    PackedParameters
        A copy, of the state's dtype. ``add_zero_attn`` is not part of a state: hand it on yourself.

    Raises
    ------
    ValueError
        If keys are missing or unknown, or shapes do not fit together.
    TypeError
        If the arrays are not floating or differ in dtype.
    """
    available = _names(state_dict, prefix)
    packed = "in_proj_weight" in available or not available.intersection(_TORCH_SEPARATE)
    weight_keys = ("in_proj_weight",) if packed else _TORCH_SEPARATE
    arrays = _read(state_dict, prefix, (*weight_keys, "out_proj.weight"), _TORCH_OPTIONAL, _TORCH_MARKS)
    if packed:
        weight = arrays["in_proj_weight"]
        sizes = PackedLayout(_rows_and_columns("in_proj_weight", weight)[1], num_heads, num_kv_heads=num_kv_heads)
        rows = [sizes.qproj_size, sizes.kproj_size, sizes.vproj_size]
        weights = _split("in_proj_weight", weight, rows)
    else:
        weights = [arrays[key] for key in _TORCH_SEPARATE]
        rows = [_rows_and_columns(key, arrays[key])[0] for key in _TORCH_SEPARATE]
    names = [f"in_proj_weight ({x} rows)" if packed else f"{x}_proj_weight" for x in "qkv"]
    in_bias = arrays.get("in_proj_bias")
    biases = [None] * 3 if in_bias is None else _split("in_proj_bias", in_bias, rows)
    linears = dict(zip("qkv", map(_Linear, names, weights, biases), strict=True))
    linears["o"] = _Linear("out_proj.weight", arrays["out_proj.weight"], arrays.get("out_proj.bias"))
    vector, layout = _pack(linears, num_heads, num_kv_heads)
    appended = arrays.get("bias_k"), arrays.get("bias_v")
    _check_appended(*appended, layout, vector)
    return PackedParameters(vector, layout, *(None if bias is None else _copy(bias) for bias in appended))


def to_torch(parameters: PackedParameters, prefix: str = "") -> dict[str, NDArray[Any]]:
    """Write parameters as the state of a ``torch.nn.MultiheadAttention``; undoes `from_torch` bit for bit.

    Parameters
    ----------
    parameters : PackedParameters
    prefix : str
        Put before every key.

    Returns
    -------
    dict of str to array
        In the order of torch's own ``state_dict``, each array a C-contiguous copy. Query, key and value share
        ``in_proj_weight`` if their input widths are equal, and have separate weights otherwise, as torch demands.
        Besides what the module can hold, ``torch.nn.functional.multi_head_attention_forward`` also takes another
        output width, and biases on only the input or only the output side.

    Raises
    ------
    ValueError
        If torch cannot express the layout, or array shapes do not fit it.
    TypeError
        If the arrays differ in dtype.
    """
    buffer, layout, bias_k, bias_v = parameters
    _check_torch_can_express(layout)
    views = layout.views(buffer)
    _check_appended(bias_k, bias_v, layout, buffer)
    xp = array_module(buffer)
    weights = {key: views[f"{key[0]}_weight"].T for key in _TORCH_SEPARATE}
    if layout.kdim == layout.vdim == layout.embed_dim:
        weights = {"in_proj_weight": xp.concatenate(list(weights.values()))}
    state = {
        **weights,
        "in_proj_bias": xp.concatenate([views[f"{x}_bias"] for x in "qkv"]) if layout.qbias else None,
        "bias_k": bias_k,
        "bias_v": bias_v,
        "out_proj.weight": views["o_weight"].T,
        "out_proj.bias": views.get("o_bias"),
    }
    return {prefix + key: _copy(value) for key, value in state.items() if value is not None}


def from_hf_bert(state_dict: Mapping[str, Any], num_heads: int, prefix: str = "") -> PackedParameters:
    """Pack one attention layer of a Hugging Face BERT, RoBERTa or ELECTRA.

    Parameters
    ----------
    state_dict : mapping of str to array or torch tensor
        ``self.query``, ``self.key``, ``self.value`` and ``output.dense``, each with ``.weight`` and optionally
        ``.bias``. ``output.LayerNorm``, which these models keep beside them, is passed over.
    num_heads : int
        ``num_attention_heads`` in the model's configuration.
    prefix : str
        What stands before these names, for instance ``"encoder.layer.0.attention."``.

    Returns
    -------
    PackedParameters
        A copy, of the state's dtype.

    Raises
    ------
    ValueError
        If keys are missing or unknown (relative positions, for instance), or shapes do not fit together.
    TypeError
        If the arrays are not floating or differ in dtype.
    """
    weights, biases = ([f"{name}.{kind}" for name in _BERT_LINEARS.values()] for kind in ("weight", "bias"))
    arrays = _read(state_dict, prefix, weights, biases, marks=("self.query.weight",), passed_over="output.LayerNorm.")
    linears = {
        letter: _Linear(name, arrays[f"{name}.weight"], arrays.get(f"{name}.bias"))
        for letter, name in _BERT_LINEARS.items()
    }
    return PackedParameters(*_pack(linears, num_heads, None))


def _names(state_dict: Mapping[str, Any], prefix: str) -> set[str]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}, not a mapping. Pass module.state_dict().")
    return {
        key.removeprefix(prefix) for key, value in state_dict.items() if key.startswith(prefix) and value is not None
    }


def _read(
    state_dict: Mapping[str, Any],
    prefix: str,
    required: Iterable[str],
    optional: Iterable[str],
    marks: tuple[str, ...],
    passed_over: str | None = None,
) -> dict[str, NDArray[Any]]:
    """The entries under `prefix` as arrays of one library and dtype, by their name without the prefix.

    `marks` are the names by which an error message recognises a layer under another prefix.
    """
    required, optional = list(required), list(optional)
    available = {name for name in _names(state_dict, prefix) if not (passed_over and name.startswith(passed_over))}
    missing = [name for name in required if name not in available]
    unknown = sorted(available.difference(required, optional))
    if missing or unknown:
        others = [key.removesuffix(mark) for key in state_dict for mark in marks if key.endswith(mark)]
        others = [found for found in others if found != prefix]
        hint = (
            f"Give the prefix of one layer, the part of its keys before {' or '.join(marks)}, and only known entries."
        )
        if missing and others:
            hint += f" Prefixes of such keys: {_some(others)}."
        raise ValueError(
            f"state_dict under prefix {prefix!r}: missing {missing}, not understood {_some(unknown)}, "
            f"present {_some(sorted(available))}. {hint}"
        )
    arrays = {name: as_array(state_dict[prefix + name]) for name in required + optional if name in available}
    array_module(*arrays.values())
    if len({array.dtype for array in arrays.values()}) > 1:
        listed = ", ".join(f"{name} {array.dtype}" for name, array in arrays.items())
        raise TypeError(f"the entries under prefix {prefix!r} differ in dtype: {listed}. Convert them to one dtype.")
    return arrays


def _some(names: list[str], limit: int = 12) -> str:
    return f"{names[:limit]} and {len(names) - limit} more" if len(names) > limit else str(names)


def _rows_and_columns(name: str, weight: NDArray[Any]) -> tuple[int, int]:
    if weight.ndim != 2:
        raise ValueError(f"{name} has shape {weight.shape}, not two axes. A weight is (out-features, in-features).")
    rows, columns = weight.shape
    return rows, columns


def _split(name: str, array: NDArray[Any], rows: list[int]) -> list[NDArray[Any]]:
    if array.shape[:1] != (sum(rows),):
        raise ValueError(
            f"{name} has shape {array.shape}, but query, key and value together need {rows} = {sum(rows)} rows. "
            "Check num_heads and num_kv_heads, and that the three are stacked whole, not head by head."
        )
    bounds = np.cumsum([0, *rows]).tolist()
    return [array[start:stop] for start, stop in pairwise(bounds)]


def _pack(
    linears: Mapping[str, _Linear], num_heads: int, num_kv_heads: int | None
) -> tuple[NDArray[Any], PackedLayout]:
    """Pack the four projections, keyed q, k, v and o."""
    shapes = {letter: _rows_and_columns(linear.name, linear.weight) for letter, linear in linears.items()}
    options: dict[str, Any] = {f"{letter}proj_size": rows for letter, (rows, _) in shapes.items()}
    options |= {f"{letter}bias": linear.bias is not None for letter, linear in linears.items()}
    (_, embed_dim), (_, kdim), (_, vdim) = (shapes[letter] for letter in "qkv")
    layout = PackedLayout(embed_dim, num_heads, kdim=kdim, vdim=vdim, num_kv_heads=num_kv_heads, **options)
    if layout.q_head_dim != layout.embed_dim // layout.num_heads:
        raise ValueError(
            f"{linears['q'].name} has shape {shapes['q']}: {layout.num_heads} heads of {layout.q_head_dim}, "
            f"but the layout's scale takes them to be {layout.embed_dim} // {layout.num_heads} wide. Check num_heads; "
            f"if it is right, use PackedLayout.pack and call attention with scale={layout.q_head_dim} ** -0.5."
        )
    features = layout.num_heads * layout.v_head_dim
    if shapes["o"][1] != features:
        raise ValueError(
            f"{linears['o'].name} has shape {shapes['o']}, but {layout.num_heads} heads of "
            f"{layout.v_head_dim} values give it {features} in-features. Check num_heads and num_kv_heads."
        )
    parts = {f"{letter}_weight": linear.weight.T for letter, linear in linears.items()}
    for letter, (name, weight, bias) in linears.items():
        if bias is None:
            continue
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"the bias of {name} has shape {bias.shape} and its weight {weight.shape}. "
                "There is one bias for each row of the weight."
            )
        parts[f"{letter}_bias"] = bias
    return layout.pack(parts, xp=array_module(*parts.values())), layout


def _check_appended(
    bias_k: NDArray[Any] | None, bias_v: NDArray[Any] | None, layout: PackedLayout, vector: NDArray[Any]
) -> None:
    if bias_k is None and bias_v is None:
        return
    if bias_k is None or bias_v is None:
        raise ValueError(
            f"bias_{'v' if bias_k is None else 'k'} is given alone. Give both bias_k and bias_v, or neither."
        )
    for name, bias, width in (("bias_k", bias_k, layout.kproj_size), ("bias_v", bias_v, layout.vproj_size)):
        if bias.shape != (1, 1, width):
            raise ValueError(f"{name} has shape {bias.shape}, not (1, 1, {width}). It is one projected row, all heads.")
        if bias.dtype != vector.dtype:
            raise TypeError(f"{name} is {bias.dtype} but io_weight_bias is {vector.dtype}. Convert one of them.")


def _check_torch_can_express(layout: PackedLayout) -> None:
    reasons = []
    if layout.num_kv_heads != layout.num_heads:
        reasons.append(f"num_kv_heads {layout.num_kv_heads} is not num_heads {layout.num_heads}")
    for name in ("qproj_size", "kproj_size", "vproj_size"):
        if getattr(layout, name) != layout.embed_dim:
            reasons.append(f"{name} {getattr(layout, name)} is not embed_dim {layout.embed_dim}")
    if layout.oproj_size == 0:
        reasons.append("there is no output projection (oproj_size 0)")
    if not layout.qbias == layout.kbias == layout.vbias:
        reasons.append(f"only some have a bias (qbias {layout.qbias}, kbias {layout.kbias}, vbias {layout.vbias})")
    if reasons:
        raise ValueError(
            f"torch.nn.MultiheadAttention cannot hold this layout: {'; '.join(reasons)}. "
            "Where a piece is absent, pack an identity weight or a zero bias in its place; the rest has no equivalent."
        )


def _copy(array: NDArray[Any]) -> NDArray[Any]:
    """A C-contiguous array of its own, also where a transpose happens to be contiguous already."""
    return array.copy(order="C")
