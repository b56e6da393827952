"""Input and output projections of a layer, and their gradients: which product, which layout.

Projected heads lie as (N, H, T, D); the products read and write that layout themselves, so nothing is transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha.matrix import Matrix, heads_of, rows_of
from mha.optional import array_module, is_array
from mha.problem import COMPUTING

Array = NDArray[Any]


def project_heads(
    backend: Any,
    x: Array,
    weight: Any,
    bias: Array | None,
    heads: int,
    appended: Sequence[Array | None] = (),
    out: Array | None = None,
) -> Array:
    """x (N, T, F) -> (N, H, T + appended, D).

    Without a weight every head gets the whole width F: the result has one head, or `heads` of them with stride 0. Each
    appended row is (1, 1, H*D or F), or None for zeros. `out` (N, H, T, D) is where a projection without appended rows
    is to go.
    """
    xp = array_module(x)
    batch, length, width = x.shape
    total = length + len(appended)
    if weight is None:
        if appended:
            rows = [xp.zeros((1, 1, width), x.dtype) if row is None else row for row in appended]
            x = xp.concatenate([x, *(xp.broadcast_to(row, (batch, 1, width)) for row in rows)], axis=1)
        return xp.broadcast_to(x[:, None], (batch, heads, total, width))
    if out is None:
        out = xp.empty((batch, heads, total, weight.shape[1] // heads), x.dtype)
        _write_rows(out[:, :, length:], appended)
    backend.product(rows_of(x), as_right(weight), heads_of(out[:, :, :length]), bias)
    return out


def with_rows(heads: Array, appended: Sequence[Array | None]) -> Array:
    """Heads (N, H, T, D) with rows appended, as `project_heads` does it."""
    if not appended:
        return heads
    batch, count, length, width = heads.shape
    out: Array = array_module(heads).empty((batch, count, length + len(appended), width), heads.dtype)
    out[:, :, :length] = heads
    _write_rows(out[:, :, length:], appended)
    return out


def _write_rows(out: Array, rows: Sequence[Array | None]) -> None:
    for i, row in enumerate(rows):
        out[:, :, i] = 0 if row is None else row.reshape(1, out.shape[1], -1)


def project_output(backend: Any, heads: Array, weight: Any, bias: Array | None, like: Array) -> Array:
    """Heads (N, H, L, Dv), side by side in memory, -> (N, L, O); without a weight they are the output.

    The positions lie in memory as those of the query, `like` (N, L, E), do.
    """
    batch, count, length, width = heads.shape
    joined = heads.swapaxes(1, 2).reshape(batch, length, count * width)
    if weight is None:
        return joined
    out = empty_like_rows(like, weight.shape[1])
    backend.product(rows_of(joined), as_right(weight), rows_of(out), bias)
    return out


def empty_like_rows(x: Array, width: int | None = None) -> Array:
    """An empty (N, T, width) whose positions and samples lie in memory in the order of x's."""
    batch, length, own = x.shape
    width = own if width is None else width
    if x.strides[0] < x.strides[1]:
        return array_module(x).empty((length, batch, width), x.dtype).swapaxes(0, 1)
    return array_module(x).empty((batch, length, width), x.dtype)


def as_right(weight: Any) -> Any:
    """A weight as the right operand of a product: an array, or what a backend's `pack` has made of one."""
    return rows_of(weight) if is_array(weight) else weight


def linear_gradients(
    backend: Any,
    x: Matrix,
    grad: Matrix,
    weight: Array,
    grad_weight: Array,
    grad_bias: Array | None,
    grad_x: Matrix,
) -> None:
    """Gradients of x @ weight + bias, written into the three targets."""
    if grad_weight.strides[0] < grad_weight.strides[1]:
        # Stored as (out-features, in-features): rows of the result lie contiguous.
        backend.product(grad.T, x, rows_of(grad_weight.T))
    else:
        backend.product(x.T, grad, rows_of(grad_weight))
    backend.product(grad, rows_of(weight).T, grad_x)
    if grad_bias is not None:
        xp = array_module(grad.array)
        one = xp.broadcast_to(xp.ones((1, 1), grad.array.dtype), (1, grad.shape[0]))
        backend.product(Matrix(one, (0,), (1,)), grad, Matrix(grad_bias.reshape(1, -1), (0,), (1,)))


def sum_over(grad: Array, axis: int) -> Array:
    """Sum over an axis, in the computing dtype: the samples, or heads that all got the same input."""
    return grad.astype(COMPUTING[grad.dtype], copy=False).sum(axis=axis).astype(grad.dtype, copy=False)


def sum_to_shape(grad: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes that broadcasting has added to or stretched in an input of `shape`."""
    if grad.shape == shape:
        return grad
    added = grad.ndim - len(shape)
    axes = tuple(i for i in range(grad.ndim) if i < added or (shape[i - added] == 1 != grad.shape[i]))
    computing = COMPUTING.get(grad.dtype, np.dtype(grad.dtype))
    return grad.astype(computing, copy=False).sum(axis=axes).astype(grad.dtype, copy=False).reshape(shape)
