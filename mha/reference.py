"""Multi-head attention as the textbook writes it: the specification and the oracle of the fast backends.

Every function builds the whole L x S matrix and keeps to NumPy's array operations, so it also runs on CuPy arrays.
Nothing here is optimised. Shapes: query (*batch, H, L, D), key (*batch, Hk, T, D), value (*batch, Hk, T, Dv), where
T counts the appended keys; batch axes broadcast; query head h uses key head ``h // (H // Hk)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mha.masks import MaskSpec, materialise
from mha.optional import array_module
from mha.problem import Norm
from mha.random import attention_keep, keep_scale, output_keep

Array = NDArray[Any]


@dataclass(frozen=True)
class _Softmax:
    """Everything up to the weights, in the computing dtype; key and value repeated to one head per query head."""

    query: Array
    key: Array
    value: Array
    visible: NDArray[np.bool_]
    #: Softmax of the scores, 0 where hidden and in empty rows.
    probability: Array
    lse: Array
    #: d capped score / d score; None without a softcap.
    slope: Array | None
    #: Applies the dropout to a (*batch, H, L, T) array.
    drop: Callable[[Array], Array]


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def attention_forward(
    query: Array,
    key: Array,
    value: Array,
    mask: MaskSpec | None,
    *,
    scale: float,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_state: tuple[int, int] | None = None,
    keep: NDArray[np.bool_] | None = None,
    dropout_scale: float | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Array, Array]:
    """Attention output, log-sum-exp of the scores, and weights.

    Parameters
    ----------
    query, key, value : array
        Shapes above; float16, bfloat16, float32 or float64.
    mask : MaskSpec, optional
    scale : float
        Factor of the products of query and key.
    softcap : float, optional
        c: scores become ``c * tanh(score / c)`` before the masks.
    dropout_p : float
        Probability of dropping a weight.
    dropout_state : (int, int), optional
        What the dropout mask is derived from; see `mha.random.attention_keep`.
    keep : bool array, optional
        The dropout mask itself, broadcastable to (*batch, H, L, T), in place of a state.
    dropout_scale : float, optional
        Factor of kept weights; None is 1 / (1 - dropout_p).
    dtype : dtype, optional
        Precision of the computation and of the results. None computes in the query's dtype, half precision in
        float32, and returns the query's dtype.

    Returns
    -------
    output : (*batch, H, L, Dv)
        0 in rows that see no key.
    lse : (*batch, H, L)
        Natural logarithm, before dropout, in the computing dtype; -inf in rows that see no key.
    weights : (*batch, H, L, T)
        After dropout.

    Raises
    ------
    ValueError
        If `dropout_p` is positive and neither `dropout_state` nor `keep` is given.
    """
    s = _softmax(query, key, value, mask, scale, softcap, dropout_p, dropout_state, keep, dropout_scale, dtype)
    weights = s.drop(s.probability)
    result = query.dtype if dtype is None else dtype
    return _visible_product(s.visible, weights, s.value).astype(result), s.lse, weights.astype(result)


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def attention_backward(
    grad_output: Array,
    query: Array,
    key: Array,
    value: Array,
    mask: MaskSpec | None,
    *,
    scale: float,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_state: tuple[int, int] | None = None,
    keep: NDArray[np.bool_] | None = None,
    dropout_scale: float | None = None,
    dtype: DTypeLike | None = None,
    grad_weights: Array | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Gradients of `attention_forward`, called with the same options.

    Parameters
    ----------
    grad_output : (*batch, H, L, Dv)
    grad_weights : (*batch, H, L, T), optional
        Gradient with respect to the returned weights, those after dropout.

    Returns
    -------
    grad_query : (*batch, H, L, D)
    grad_key, grad_value : (*batch, Hk, T, D or Dv)
        Summed over the query heads that share a key head; batch axes are the broadcast ones.
    grad_scores : (*batch, H, L, T)
        Gradient with respect to what the masks add, in the computing dtype; 0 where hidden.
    """
    s = _softmax(query, key, value, mask, scale, softcap, dropout_p, dropout_state, keep, dropout_scale, dtype)
    xp = array_module(query)
    grad_output = grad_output.astype(s.query.dtype)
    grad_weight = grad_output @ s.value.swapaxes(-1, -2)
    if grad_weights is not None:
        grad_weight = grad_weight + grad_weights.astype(s.query.dtype)
    grad_probability = xp.where(s.visible, s.drop(grad_weight), 0)
    row = (s.probability * grad_probability).sum(axis=-1, keepdims=True)
    grad_scores = xp.where(s.visible, s.probability * (grad_probability - row), 0)
    grad_products = float(scale) * (grad_scores if s.slope is None else grad_scores * s.slope)
    from_key = s.visible.swapaxes(-1, -2)
    grad_query = _visible_product(s.visible, grad_products, s.key)
    grad_key = _visible_product(from_key, grad_products.swapaxes(-1, -2), s.query)
    grad_value = _visible_product(from_key, s.drop(s.probability).swapaxes(-1, -2), grad_output)
    result = query.dtype if dtype is None else dtype
    return (
        grad_query.astype(result),
        _sum_group(grad_key, key.shape[-3]).astype(result),
        _sum_group(grad_value, value.shape[-3]).astype(result),
        grad_scores,
    )


def output_dropout(
    x: Array,
    p: float,
    state: tuple[int, int] | None = None,
    keep: NDArray[np.bool_] | None = None,
    scale: float | None = None,
) -> Array:
    """Dropout of a layer's output (N, L, E) or (L, E), in the dtype of `x`.

    The state is the output's own: its offset is one more than that of the layer's attention weights. `scale` is the
    factor of kept elements, None for 1 / (1 - p).
    """
    factor = keep_scale(p) if scale is None else scale
    if keep is None and (p > 0 or factor != 1):
        if state is None:
            raise ValueError(f"dropout p={p} has neither a state nor a mask. Pass state=next_state() or keep.")
        *batch, length, features = x.shape
        keep = output_keep(state, p, math.prod(batch), length, features, xp=array_module(x)).reshape(x.shape)
    return x if keep is None else _dropped(x, keep, factor, array_module(x))


def layer_norm(x: Array, norm: Norm) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, in the computing dtype of `x`."""
    normed, _ = _normed(x, norm)
    normed = normed if norm.scale is None else normed * norm.scale.astype(normed.dtype)
    return normed if norm.bias is None else normed + norm.bias.astype(normed.dtype)


def layer_norm_backward(grad_output: Array, x: Array, norm: Norm) -> tuple[Array, Array, Array]:
    """Gradients of x, scale and bias, in the computing dtype; of the last two also where they are None."""
    normed, factor = _normed(x, norm)
    grad = grad_output.astype(normed.dtype)
    rows = tuple(range(x.ndim - 1))
    of_scale, of_bias = (grad * normed).sum(axis=rows), grad.sum(axis=rows)
    grad = grad if norm.scale is None else grad * norm.scale.astype(normed.dtype)
    slope = (grad * normed).mean(axis=-1, keepdims=True)
    return factor * (grad - grad.mean(axis=-1, keepdims=True) - normed * slope), of_scale, of_bias


def _normed(x: Array, norm: Norm) -> tuple[Array, Array]:
    """Without scale and bias; and the factor 1 / sqrt(variance + epsilon)."""
    x = x.astype(x.dtype if x.dtype.itemsize > 8 else _computing_dtype(x.dtype))
    centered = x - x.mean(axis=-1, keepdims=True)
    centered = centered - centered.mean(axis=-1, keepdims=True)
    factor = 1 / array_module(x).sqrt((centered * centered).mean(axis=-1, keepdims=True) + norm.epsilon)
    return centered * factor, factor


def _softmax(
    query: Array,
    key: Array,
    value: Array,
    mask: MaskSpec | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    dropout_state: tuple[int, int] | None,
    keep: NDArray[np.bool_] | None,
    dropout_scale: float | None,
    dtype: DTypeLike | None,
) -> _Softmax:
    xp = array_module(query, key, value)
    mask = MaskSpec() if mask is None else mask
    native = _computing_dtype(query.dtype)
    computing = native if dtype is None else np.dtype(dtype)
    batch = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    heads, queries, keys = query.shape[-3], query.shape[-2], key.shape[-2]
    q, k, v = (_one_per_query_head(x.astype(computing), batch, heads, xp) for x in (query, key, value))

    scores = (q * float(scale)) @ k.swapaxes(-1, -2)
    slope = None
    visible, bias = materialise(mask, batch, heads, queries, keys - mask.extra, computing, xp)
    if softcap is not None:
        cap = float(softcap)
        capped = xp.tanh(scores / cap)
        scores, slope = cap * capped, 1 - capped * capped
    if bias is not None:
        # Minima of the inputs' own precision clamp alike, whatever precision this runs in.
        lowest = max(float(np.finfo(native).min), float(np.finfo(computing).min))
        scores = xp.maximum(scores + bias, lowest)
    probability, lse = _normalise(xp.where(visible, scores, -np.inf).astype(computing), xp)

    factor = keep_scale(dropout_p) if dropout_scale is None else dropout_scale
    if keep is None and (dropout_p > 0 or factor != 1):
        if dropout_state is None:
            raise ValueError(f"dropout_p={dropout_p} has neither a state nor a mask. Pass dropout_state or keep.")
        keep = attention_keep(dropout_state, dropout_p, math.prod(batch), heads, queries, keys, xp=xp)
        keep = keep.reshape(scores.shape)
    drop = (lambda x: x) if keep is None else (lambda x: _dropped(x, keep, factor, xp))
    return _Softmax(q, k, v, visible, probability, lse, slope, drop)


def _normalise(scores: Array, xp: ModuleType) -> tuple[Array, Array]:
    """Softmax and log-sum-exp over the last axis; a row of -inf gives zeros and -inf."""
    rows = (*scores.shape[:-1], 1)
    peak = scores.max(axis=-1, keepdims=True) if scores.shape[-1] else xp.full(rows, -np.inf, scores.dtype)
    peak = xp.where(peak == -np.inf, 0, peak)
    exponential = xp.exp(scores - peak)
    total = exponential.sum(axis=-1, keepdims=True)
    probability = exponential / xp.where(total == 0, 1, total)
    return probability, (peak + xp.log(total))[..., 0]


def _visible_product(visible: NDArray[np.bool_], left: Array, right: Array) -> Array:
    """``left @ right`` in which hidden pairs (i, j) take no part, even where right holds NaN or inf in row j."""
    xp = array_module(left)
    left = xp.where(visible, left, 0)
    if bool(xp.isfinite(right).all()):
        return left @ right
    columns = [xp.where(visible, left * right[..., None, :, d], 0).sum(axis=-1) for d in range(right.shape[-1])]
    product: Array = xp.stack(columns, axis=-1)
    return product


def _computing_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """float64 for float64 in any byte order; float32 for all else."""
    return np.dtype(np.float64 if np.dtype(dtype).itemsize == 8 else np.float32)


def _dropped(x: Array, keep: NDArray[np.bool_], factor: float, xp: ModuleType) -> Array:
    dropped: Array = xp.where(keep, x * factor, 0)
    return dropped.astype(x.dtype)


def _one_per_query_head(x: Array, batch: tuple[int, ...], heads: int, xp: ModuleType) -> Array:
    """(..., Hk, T, D) -> (*batch, H, T, D)."""
    x = xp.repeat(x, heads // max(x.shape[-3], 1), axis=-3)
    repeated: Array = xp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return repeated


def _sum_group(x: Array, kv_heads: int) -> Array:
    """(*batch, H, T, D) -> (*batch, Hk, T, D), the sum over the query heads of each key head."""
    *batch, heads, rows, width = x.shape
    total: Array = x.reshape(*batch, kv_heads, heads // max(kv_heads, 1), rows, width).sum(axis=-3)
    return total
