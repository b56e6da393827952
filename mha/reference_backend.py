"""The reference implementation with the functions of a backend: for tests, and for arrays no kernel takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from mha import reference
from mha.explanation import Explanation, Pass, described
from mha.matrix import Matrix
from mha.optional import array_module
from mha.problem import COMPUTING, AttentionProblem, Dropout, Norm, RowStatistics

Array = NDArray[Any]

NAME = "reference"


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    """It runs everything."""
    return []


def check(library: ModuleType) -> None:
    """It runs wherever the arrays are."""


def explain(problem: AttentionProblem) -> Explanation:
    """No kernel, and buffers of L x S: the scores and what is made of them."""
    p = problem
    rows, size = p.batch * p.heads * p.queries * p.computing.itemsize, p.batch * p.dtype.itemsize
    results = size * p.heads * p.queries * p.v_head_dim + rows
    gradients = size * sum(math.prod(x.shape[-3:]) for x in (p.query, p.key, p.value))
    passes = Pass((), results, rows * p.keys), Pass((), gradients, 2 * rows * p.keys)
    return Explanation(NAME, f"{p.xp.__name__}'s own operations", described(p), *passes)


def attention_forward(problem: AttentionProblem, heads_last: bool = False) -> tuple[Array, Array, RowStatistics]:
    """See `mha.cpu.attention_forward`."""
    output, lse, _ = _forward(problem)
    if heads_last:
        output = array_module(output).ascontiguousarray(output.swapaxes(-2, -3)).swapaxes(-2, -3)
    return output, lse, RowStatistics(lse)


def attention_weights(problem: AttentionProblem, rows: RowStatistics, average: bool) -> Array:
    """See `mha.cpu.attention_weights`."""
    weights = _forward(problem)[2]
    if not average:
        return weights
    return weights.astype(problem.computing).mean(axis=-3).astype(weights.dtype)


def attention_backward(
    problem: AttentionProblem,
    grad_output: Array,
    output: Array,
    rows: RowStatistics,
    grad_weights: Array | None = None,
    grad_weights_scale: float = 1.0,
    mask_shapes: Sequence[tuple[int, int, int, int]] = (),
) -> tuple[Array, Array, Array, list[Array]]:
    """See `mha.cpu.attention_backward`."""
    p = problem
    if grad_weights is not None:
        grad_weights = grad_weights.astype(p.computing) * grad_weights_scale
    *gradients, scores = reference.attention_backward(
        grad_output, p.query, p.key, p.value, p.mask, grad_weights=grad_weights, **_options(p)
    )
    own = scores.reshape(p.batch, p.heads, p.queries, p.keys)[..., : p.keys - p.mask.extra]
    summed = []
    for shape in mask_shapes:
        axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
        summed.append(own.sum(axis=axes, keepdims=True).reshape(shape))
    return gradients[0], gradients[1], gradients[2], summed


def product(left: Matrix, right: Matrix, out: Matrix, bias: Array | None = None) -> None:
    """See `mha.cpu.product`."""
    computing = COMPUTING[out.array.dtype]
    value = left.dense().astype(computing) @ right.dense().astype(computing)
    if bias is not None:
        value = value + bias.astype(computing)
    out.assign(value)


def pack(right: Matrix) -> Matrix:
    """See `mha.cpu.pack`."""
    return right


def residual_norm(
    x: Array, dropout: Dropout | None = None, residual: Array | None = None, norm: Norm | None = None
) -> tuple[Array, Array]:
    """See `mha.cpu.residual_norm`."""
    total = x.astype(COMPUTING[x.dtype])
    if dropout is not None:
        total = reference.output_dropout(total, dropout.p, dropout.state, dropout.keep, dropout.factor)
    if residual is not None:
        total = total + residual.astype(total.dtype)
    stored = total.astype(x.dtype)
    return (stored if norm is None else reference.layer_norm(total, norm).astype(x.dtype)), stored


def residual_norm_backward(
    grad_output: Array, total: Array, norm: Norm, dropout: Dropout | None = None
) -> tuple[Array, Array, Array, Array]:
    """See `mha.cpu.residual_norm_backward`."""
    grad, of_scale, of_bias = reference.layer_norm_backward(grad_output, total, norm)
    grad = grad.astype(total.dtype)
    return grad, (grad if dropout is None else residual_norm(grad, dropout)[0]), of_scale, of_bias


def _forward(p: AttentionProblem) -> tuple[Array, Array, Array]:
    return reference.attention_forward(p.query, p.key, p.value, p.mask, **_options(p))


def _options(p: AttentionProblem) -> dict[str, Any]:
    options: dict[str, Any] = {"scale": p.scale, "softcap": p.softcap}
    if p.dropout is not None:
        options |= {"dropout_p": p.dropout.p, "dropout_state": p.dropout.state, "keep": p.dropout.keep}
        options["dropout_scale"] = p.dropout.factor
    return options
