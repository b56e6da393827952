"""The CPU backend: Cython kernels, OpenMP, NumPy arrays. Its functions are those of every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha.cpu import launch
from mha.cpu.describe import check as check
from mha.cpu.describe import explain as explain
from mha.cpu.plan import (
    AttentionPlan,
    Facts,
    plan_backward,
    plan_forward,
    plan_product,
    plan_residual_norm,
    plan_rows,
    turn_round,
)
from mha.matrix import Matrix
from mha.problem import COMPUTING, AttentionProblem, Dropout, Norm, RowStatistics

Array = NDArray[Any]

NAME = "cpu"

#: The modes of the kernel attention_weights.
_WEIGHTS, _AVERAGE, _MASK_GRADIENT, _DELTA, _ROW_SCALE = range(5)


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    reasons = []
    if problem.dropout is not None and problem.dropout.state is None:
        reasons.append("it draws dropout from a state and takes no explicit mask")
    return reasons


def attention_forward(problem: AttentionProblem, heads_last: bool = False) -> tuple[Array, Array, RowStatistics]:
    """Output (*batch, H, L, Dv), log-sum-exp (*batch, H, L), and the statistics that the functions below take.

    With `heads_last` the output is a view of (*batch, L, H, Dv) memory, so that its heads lie side by side.
    """
    p = problem
    shape = (*p.batch_shape, p.heads, p.queries, p.v_head_dim)
    if heads_last:
        output = np.empty((*p.batch_shape, p.queries, p.heads, p.v_head_dim), p.dtype).swapaxes(-2, -3)
    else:
        output = np.empty(shape, p.dtype)
    lse = np.empty(shape[:-1], p.computing)
    rows = RowStatistics(np.empty_like(lse), np.empty_like(lse))
    if not lse.size:
        return output, lse, rows
    facts = launch.facts(p.dtype)
    plan = plan_forward(p.sizes, facts)
    block = launch.attention(p, facts.kernels)
    launch.follow(block, plan)
    block.view("output", output, p.batch_shape)
    block.pointer("lse", lse)
    block.pointer("shift", rows.shift)
    block.pointer("row_scale", rows.scale)
    if plan.kernel == "attention_decode":
        block.room("partials", facts.kernels.attention_decode_partials(block.packed(), block.double))
    _run(block, plan)
    return output, lse, rows


def attention_weights(problem: AttentionProblem, rows: RowStatistics, average: bool) -> Array:
    """Weights after dropout: (*batch, H, L, T), or averaged over the heads (*batch, L, T)."""
    p = problem
    heads = 1 if average else p.heads
    weights = np.zeros((*p.batch_shape, heads, p.queries, p.keys), p.dtype)
    if not weights.size or not p.heads:
        return weights[..., 0, :, :] if average else weights
    facts = launch.facts(p.dtype)
    block = launch.attention(p, facts.kernels)
    _statistics(block, p, rows, facts)
    block.view("target", weights, p.batch_shape)
    block.set(mode=_AVERAGE if average else _WEIGHTS, target_batch=p.batch, target_heads=heads)
    block.set(target_rows=p.queries, target_keys=p.keys)
    _run_rows(block, p, facts)
    return weights[..., 0, :, :] if average else weights


def attention_backward(
    problem: AttentionProblem,
    grad_output: Array,
    output: Array,
    rows: RowStatistics,
    grad_weights: Array | None = None,
    grad_weights_scale: float = 1.0,
    mask_shapes: Sequence[tuple[int, int, int, int]] = (),
) -> tuple[Array, Array, Array, list[Array]]:
    """Gradients of query, key and value, with the broadcast batch axes, and of additive masks.

    Parameters
    ----------
    grad_output, output : (*batch, H, L, Dv)
    rows : RowStatistics
        The forward's, or those of a log-sum-exp.
    grad_weights : (*batch, H or 1, L, T), optional
        Gradient of the returned weights; `grad_weights_scale` is 1 / H for averaged ones.
    mask_shapes : sequence of (N or 1, H or 1, L or 1, S)
        For each, the gradient of the scores summed over the axes of size 1.
    """
    p = problem
    if not p.batch * p.heads:
        zeros = [np.zeros((*p.batch_shape, *x.shape[-3:]), p.dtype) for x in (p.query, p.key, p.value)]
        return zeros[0], zeros[1], zeros[2], [np.zeros(shape, p.computing) for shape in mask_shapes]
    facts = launch.facts(p.dtype)
    block = launch.attention(p, facts.kernels)
    delta = np.empty((*p.batch_shape, p.heads, p.queries), p.computing)
    _statistics(block, p, rows, facts)
    block.pointer("delta", delta)
    block.view("output", output, p.batch_shape)
    block.view("grad_output", grad_output, p.batch_shape)
    _run(block, plan_rows("attention_delta", p.sizes, facts))
    if grad_weights is not None:
        everywhere = np.broadcast_to(grad_weights, (*p.batch_shape, p.heads, p.queries, p.keys))
        block.view("grad_weights", everywhere, p.batch_shape)
        block.set(grad_weights_scale=grad_weights_scale, mode=_DELTA)
        _run_rows(block, p, facts)
    gradients = []
    for name, x in (("query", p.query), ("key", p.key), ("value", p.value)):
        gradient = np.empty((*p.batch_shape, *x.shape[-3:]), p.dtype)
        block.view(f"grad_{name}", gradient, p.batch_shape)
        gradients.append(gradient)
    for plan in plan_backward(p.sizes, facts):
        launch.follow(block, plan)
        _run(block, plan)
    grad_query, grad_key, grad_value = gradients
    return grad_query, grad_key, grad_value, [_mask_gradient(block, p, shape, facts) for shape in mask_shapes]


#: A log-sum-exp carries its rounding, a relative 2**-24 times its size (float32), into every probability of the row.
#: Up to this size that is a few ulp. Beyond it a pass over the scores makes up for it: the finite minimum of a mask
#: swallows the logarithm of the sum whole.
_COARSE = 32.0


def _statistics(block: launch.Launch, problem: AttentionProblem, rows: RowStatistics, facts: Facts) -> None:
    shift = np.ascontiguousarray(rows.shift, problem.computing)
    block.pointer("shift", shift)
    if rows.scale is not None:
        block.pointer("row_scale", rows.scale)
    elif ((np.abs(shift) > _COARSE) & np.isfinite(shift)).any():
        block.pointer("row_scale", np.empty(shift.shape, problem.computing))
        block.set(mode=_ROW_SCALE)
        _run_rows(block, problem, facts)


def _mask_gradient(
    block: launch.Launch, problem: AttentionProblem, shape: tuple[int, int, int, int], facts: Facts
) -> Array:
    gradient = np.empty(shape, problem.computing)
    batch, heads, rows, keys = shape
    block.view("target", gradient, (batch,))
    block.set(mode=_MASK_GRADIENT, target_batch=batch, target_heads=heads, target_rows=rows, target_keys=keys)
    _run_rows(block, problem, facts)
    return gradient


def product(left: Matrix, right: Matrix | launch.PackedMatrix, out: Matrix, bias: Array | None = None) -> None:
    """out = left @ right + bias, summed in the computing dtype of the operands' own; `right` may be one of `pack`."""
    computing = COMPUTING[out.array.dtype]
    (m, k), n = left.shape, right.shape[1]
    if m == 0 or n == 0:
        return
    operands = {left.array.dtype, (right.matrix if isinstance(right, launch.PackedMatrix) else right).array.dtype}
    facts = launch.facts(left.array.dtype if len(operands) == 1 else computing)
    if isinstance(right, launch.PackedMatrix):
        if right.kernels is facts.kernels:
            launch.product(left, right, out, bias, plan_product(m, n, k, False, facts), facts)
            return
        right = right.matrix
    x = right.array
    in_computing = x.dtype == left.array.dtype == out.array.dtype == computing
    if turn_round(m, n, in_computing and _contiguous(right, right.row_axes), facts):
        launch.product(right.T, left.T, out.T, bias, plan_product(n, m, k, False, facts), facts, bias_by_rows=True)
        return
    in_place = (
        x.dtype == computing and len(right.row_axes) == 1 and n % facts.lanes == 0
        and _contiguous(right, right.column_axes)
    )  # fmt: skip
    launch.product(left, right, out, bias, plan_product(m, n, k, in_place, facts), facts)


def _contiguous(matrix: Matrix, axes: tuple[int, ...]) -> bool:
    """Whether the rows or columns are one axis of neighbours."""
    return len(axes) == 1 and matrix.array.strides[axes[0]] == matrix.array.itemsize


def pack(right: Matrix) -> launch.PackedMatrix:
    """The right operand of many products, laid out for them once."""
    facts = launch.facts(right.array.dtype)
    return launch.pack(right, plan_product(1024, right.shape[1], right.shape[0], False, facts), facts)


def residual_norm(
    x: Array, dropout: Dropout | None = None, residual: Array | None = None, norm: Norm | None = None
) -> tuple[Array, Array]:
    """norm(total) and total = dropout(x) + residual, (N, L, E) each; without a norm both are one array."""
    plain = dropout is None and residual is None
    output = np.empty(x.shape, x.dtype)
    total = output if norm is None else x if plain else np.empty(x.shape, x.dtype)
    if x.size:
        facts = launch.facts(x.dtype)
        arrays = {"x": x, "residual": residual, "output": output, "total": None if norm is None or plain else total}
        plan = plan_residual_norm(x.shape[0] * x.shape[1], x.shape[2], facts)
        launch.residual_norm("residual_norm", arrays, None, dropout, norm, plan, facts)
    return output, total


def residual_norm_backward(
    grad_output: Array, total: Array, norm: Norm, dropout: Dropout | None = None
) -> tuple[Array, Array, Array, Array]:
    """Gradients of total, which is that of the residual, of x, and of scale and bias in the computing dtype."""
    computing = COMPUTING[total.dtype]
    of_total = np.empty(total.shape, total.dtype)
    of_x = of_total if dropout is None else np.empty(total.shape, total.dtype)
    sums = np.zeros(total.shape[2], computing), np.zeros(total.shape[2], computing)
    if total.size:
        facts = launch.facts(computing)
        arrays = {"total": total, "output": grad_output, "residual": of_total, "x": None if dropout is None else of_x}
        plan = plan_residual_norm(total.shape[0] * total.shape[1], total.shape[2], facts)
        launch.residual_norm("residual_norm_backward", arrays, sums, dropout, norm, plan, facts)
    return of_total, of_x, *sums


def _run(block: launch.Launch, plan: AttentionPlan) -> None:
    block.run(plan.kernel, plan.threads)


def _run_rows(block: launch.Launch, problem: AttentionProblem, facts: Facts) -> None:
    plan = plan_rows("attention_weights", problem.sizes, facts)
    launch.follow(block, plan)
    _run(block, plan)
