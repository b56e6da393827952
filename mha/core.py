"""Scaled dot-product attention and its backward, for arrays of any backend."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from numpy.typing import NDArray

from mha import masks
from mha.cpu.replay import repeat
from mha.dispatch import backend_for
from mha.exchange import in_kind
from mha.mask_checks import Window
from mha.optional import array_module
from mha.problem import AttentionProblem, Dropout, RowStatistics, checked_probability, shapes_of, usable
from mha.projection import sum_to_shape
from mha.random import DropoutState, next_state

Array = NDArray[Any]


class AttentionGradients(NamedTuple):
    """Gradients of `scaled_dot_product_attention`, each in its input's own shape."""

    query: Array
    key: Array
    value: Array
    attn_mask: Array | None


@in_kind
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window = None,
    softcap: float | None = None,
    causal_offset: Any = 0,
    key_lengths: Any = None,
    query_lengths: Any = None,
    dropout_state: tuple[int, int] | None = None,
    return_lse: bool = False,
) -> Any:
    """softmax(scale * query @ key^T + masks) @ value, without a buffer of size L x S.

    Parameters
    ----------
    query : (..., H, L, D) array
        float16, bfloat16, float32 or float64; with two axes (L, D).
    key : (..., Hk, S, D) array
        Leading axes broadcast as NumPy's do; nothing is copied.
    value : (..., Hk, S, Dv) array
    attn_mask : array, optional
        At least 2-D and broadcastable to (..., H, L, S). bool: True = attend. float, of the query's dtype or float32:
        added to the scaled scores.
    dropout_p : float
        Probability with which a weight is dropped; the others are multiplied by 1 / (1 - dropout_p).
    is_causal : bool
        Query i sees keys j <= i + causal_offset, top-left aligned, together with every other mask.
    scale : float, optional
        None is D ** -0.5; 0 is honoured.
    enable_gqa : bool
        Lets H be a multiple of the heads of key and value; query head h uses key head h // (H // Hk). Without it they
        broadcast, 1 to H.
    window : int or (int, int), optional
        Keys before and after a query's position that it sees; w is (w, 0), -1 is unlimited.
    softcap : float, optional
        c: scores become c * tanh(score / c) before the masks.
    causal_offset : int or (N,) integers
        Query i stands at position i + causal_offset for `is_causal` and `window`.
    key_lengths, query_lengths : (N,) integers, optional
        Valid keys and queries of each sample, N the product of the leading axes.
    dropout_state : (seed, offset), optional
        What the dropout mask is drawn from; None draws the next one. Pass the same to the backward.
    return_lse : bool
        Also return the log-sum-exp of the scores.

    Returns
    -------
    output : (..., H, L, Dv) array
        Of the query's dtype; 0 for a query that sees no key.
    lse : (..., H, L) array, if asked for
        Natural logarithm, before dropout; float32, for float64 inputs float64; -inf for a query that sees no key.

    Raises
    ------
    TypeError
        For dtypes that differ or are no float, masks of another dtype, arrays of different libraries.
    ValueError
        For shapes that do not fit and options out of range.

    Notes
    -----
    After ``torch.nn.functional.scaled_dot_product_attention``; the algorithm is that of FlashAttention (Dao et al.,
    2022). A key hidden from a query leaks nothing to it, NaN and inf included. Arrays that export DLPack (PyTorch, JAX)
    are taken without a copy and answered in kind.
    """
    options = (dropout_p, is_causal, scale, enable_gqa, window, softcap, causal_offset)

    def call(query: Array, key: Array, value: Array) -> Any:
        state = _drawn(dropout_p, dropout_state)
        problem = _problem(query, key, value, attn_mask, *options, key_lengths, query_lengths, state)
        output, lse, _ = backend_for(problem).attention_forward(problem)
        shape = (*problem.batch_shape, *output.shape[-3:])
        if query.ndim == key.ndim == value.ndim == 2:
            output, lse = output[0], lse[0]
        else:
            output = output.reshape(shape)
        return (output, lse) if return_lse else output

    if attn_mask is None and key_lengths is None and query_lengths is None and dropout_p == 0:
        return repeat(call, (query, key, value), ("attention", return_lse, *options))
    return call(query, key, value)


@in_kind
def scaled_dot_product_attention_backward(
    grad_output: Array,
    query: Array,
    key: Array,
    value: Array,
    output: Array,
    lse: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window = None,
    softcap: float | None = None,
    causal_offset: Any = 0,
    key_lengths: Any = None,
    query_lengths: Any = None,
    dropout_state: tuple[int, int] | None = None,
    mask_gradients: bool = False,
) -> AttentionGradients:
    """Gradients of `scaled_dot_product_attention`, called with the same options, by recomputation.

    Parameters
    ----------
    grad_output : (..., H, L, Dv) array
        Gradient of the output.
    output, lse : arrays
        What the forward returned.
    dropout_state : (seed, offset)
        The forward's; needed if dropout_p > 0.
    mask_gradients : bool
        Also return the gradient of a float `attn_mask`.

    Returns
    -------
    AttentionGradients
        query, key, value and attn_mask (None unless asked for and float), each in its input's shape and dtype.

    Raises
    ------
    TypeError, ValueError
        As the forward; ValueError if shapes of grad_output, output and lse do not fit, or if dropout has no state.
    """
    if dropout_p > 0 and dropout_state is None:
        raise ValueError(
            f"dropout_p is {dropout_p} but dropout_state is None, so the forward's mask cannot be drawn again. "
            "Draw a state with mha.random.next_state() and pass it to both."
        )
    problem = _problem(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap,
                       causal_offset, key_lengths, query_lengths, dropout_state)  # fmt: skip
    heads = (*problem.batch_shape, problem.heads, problem.queries)
    wide = (*heads, problem.v_head_dim)
    named = {"grad_output": (grad_output, wide), "output": (output, wide), "lse": (lse, heads)}
    arrays = {name: _as_forward(name, x, shape, problem) for name, (x, shape) in named.items()}
    float_mask = mask_gradients and problem.mask.pair_bias is not None
    shapes = [_mask_shape(attn_mask, problem)] if float_mask and attn_mask is not None else []
    *gradients, summed = backend_for(problem).attention_backward(
        problem, arrays["grad_output"], arrays["output"], RowStatistics(arrays["lse"]), mask_shapes=shapes
    )
    mask_gradient = None
    if shapes and attn_mask is not None:
        full = summed[0].reshape(*(problem.batch_shape if shapes[0][0] > 1 else (1,)), *shapes[0][1:])
        mask_gradient = sum_to_shape(full, _padded(attn_mask.shape, full.ndim)).reshape(attn_mask.shape)
        mask_gradient = mask_gradient.astype(attn_mask.dtype)
    of_query, of_key, of_value = (_own_shape(g, x) for g, x in zip(gradients, (query, key, value), strict=True))
    return AttentionGradients(of_query, of_key, of_value, mask_gradient)


def _problem(
    query: Array, key: Array, value: Array, attn_mask: Array | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool, window: Window, softcap: float | None, causal_offset: Any,
    key_lengths: Any, query_lengths: Any, dropout_state: tuple[int, int] | None,
) -> AttentionProblem:  # fmt: skip
    xp = array_module(query, key, value)
    if min(query.ndim, key.ndim, value.ndim) < 2:
        shapes = shapes_of(query=query, key=key, value=value)
        raise ValueError(f"{shapes}: each needs at least two axes, (length, head size). Add them with x[None].")
    q, k, v = (x[(None,) * (3 - x.ndim)] if x.ndim < 3 else x for x in (query, key, value))
    q, k, v = _matching_heads(q, k, v, enable_gqa, xp)
    # The shapes are checked by the problem, so the mask's builder must not meet shapes that do not fit.
    problem = AttentionProblem.build(
        q, k, v, masks.MaskSpec(), scale, softcap, _dropout(checked_probability("dropout_p", dropout_p), dropout_state)
    )
    spec = masks.for_scaled_dot_product(
        attn_mask, batch_shape=problem.batch_shape, heads=problem.heads, queries=problem.queries, keys=problem.keys,
        dtype=problem.dtype, is_causal=is_causal, window=window, causal_offset=causal_offset, key_lengths=key_lengths,
        query_lengths=query_lengths, xp=xp,
    )  # fmt: skip
    return replace(problem, mask=spec)


def _matching_heads(query: Array, key: Array, value: Array, enable_gqa: bool, xp: Any) -> tuple[Array, Array, Array]:
    """Key and value with one head count, a divisor of the query's: heads broadcast, or are grouped on request."""
    counts = [x.shape[-3] for x in (query, key, value)]
    if counts[0] == counts[1] == counts[2]:
        return query, key, value
    shapes = shapes_of(query=query, key=key, value=value)
    heads = counts[0] if enable_gqa or counts[0] != 1 else max(counts, default=1)
    if any(count not in (1, heads) for count in counts[1:]) and not enable_gqa:
        raise ValueError(
            f"{shapes}: key and value have {counts[1]} and {counts[2]} heads for {heads} query heads. "
            "Pass enable_gqa=True for grouped heads; otherwise they are 1 or as many as the query's."
        )
    if any((heads % count if count else heads) != 0 for count in counts):
        raise ValueError(f"{shapes}: {heads} query heads are no multiple of the others' {counts[1:]}. Check axis -3.")
    both = counts[1] if counts[1] == counts[2] else math.lcm(*counts[1:])
    return _more_heads(query, heads, xp), _more_heads(key, both, xp), _more_heads(value, both, xp)


def _more_heads(x: Array, heads: int, xp: Any) -> Array:
    if x.shape[-3] == 1:
        return xp.broadcast_to(x, (*x.shape[:-3], heads, *x.shape[-2:]))
    return x if x.shape[-3] == heads else xp.repeat(x, heads // x.shape[-3], axis=-3)


def _drawn(dropout_p: float, state: tuple[int, int] | None) -> tuple[int, int] | None:
    return next_state() if state is None and dropout_p > 0 else state


def _dropout(p: float, state: tuple[int, int] | None) -> Dropout | None:
    return None if p == 0 or state is None else Dropout(p, DropoutState(*state))


def _as_forward(name: str, x: Array, shape: tuple[int, ...], problem: AttentionProblem) -> Array:
    """Something the forward returned, or its gradient, with the problem's axes."""
    array_module(problem.query, x)
    if _padded(x.shape, len(shape)) != shape:
        raise ValueError(f"{name} {x.shape} does not fit the inputs, which give {shape}. Pass what the forward gave.")
    wanted = problem.computing if name == "lse" else problem.dtype
    if x.dtype != wanted:
        raise TypeError(f"{name} is {x.dtype} where the forward has {wanted}. Convert it with astype.")
    return usable(x.reshape(shape), problem.xp)


def _own_shape(gradient: Array, x: Array) -> Array:
    """Summed over whatever `x` was broadcast to or repeated along."""
    shape = _padded(x.shape, 3)
    *batch, heads, length, width = gradient.shape
    if 1 < shape[-3] < heads:
        split = gradient.reshape(*batch, shape[-3], heads // shape[-3], length, width)
        gradient = sum_to_shape(split, (*batch, shape[-3], 1, length, width)).reshape(*batch, shape[-3], length, width)
    return sum_to_shape(gradient, shape).reshape(x.shape)


def _padded(shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    return (1,) * (ndim - len(shape)) + tuple(shape)


def _mask_shape(mask: Array, problem: AttentionProblem) -> tuple[int, int, int, int]:
    """(N or 1, H or 1, L or 1, S) of a mask's gradient before batch axes that broadcast only in part are summed."""
    *batch, heads, queries, _ = _padded(mask.shape, len(problem.batch_shape) + 3)
    samples = 1 if math.prod(batch) == 1 else problem.batch
    keys = problem.keys
    return samples, heads, queries, keys
