"""The GPU backend: CUDA kernels, CuPy arrays. Its functions are those of every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha.gpu import launch, runtime
from mha.gpu.describe import check as check
from mha.gpu.describe import explain as explain
from mha.gpu.plan import (
    AVERAGE,
    DELTA,
    MASK_GRADIENT,
    MOST_COLUMNS,
    ROW_SCALE,
    WEIGHTS,
    partial_size,
    plan_backward,
    plan_forward,
    plan_residual_norm,
    plan_residual_norm_backward,
    plan_rows,
    plan_weights,
)
from mha.gpu.tiles import Traits
from mha.matrix import Matrix
from mha.optional import array_module
from mha.params import STORAGE
from mha.problem import COMPUTING, AttentionProblem, Dropout, Norm, RowStatistics

Array = NDArray[Any]

NAME = "gpu"

#: Indices within a head are 32 bits wide.
_MOST_ROWS = 2**31 - 2**10


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    p, reasons = problem, []
    if p.dropout is not None and p.dropout.state is None:
        reasons.append("it draws dropout from a state and takes no explicit mask")
    if max(p.head_dim, p.v_head_dim) > MOST_COLUMNS:
        reasons.append(f"head sizes ({p.head_dim}, {p.v_head_dim}) are larger than {MOST_COLUMNS}")
    if max(p.queries * max(p.heads, 1), p.keys) > _MOST_ROWS:
        reasons.append(f"{p.heads} heads of {p.queries} queries and {p.keys} keys are more than 32-bit indices reach")
    capability = runtime.of(p.xp).facts().capability
    if capability < 80 and p.dtype == np.float64 and max(p.head_dim, p.v_head_dim) > 128:
        reasons.append(f"float64 heads wider than 128 need compute capability 8.0, not {capability / 10}")
    return reasons


def attention_forward(problem: AttentionProblem, heads_last: bool = False) -> tuple[Array, Array, RowStatistics]:
    """Output (*batch, H, L, Dv), log-sum-exp (*batch, H, L), and the statistics that the functions below take.

    With `heads_last` the output is a view of (*batch, L, H, Dv) memory, so that its heads lie side by side.
    """
    p, device = problem, runtime.of(problem.xp)
    shape = (*p.batch_shape, p.heads, p.queries, p.v_head_dim)
    if heads_last:
        output = p.xp.empty((*p.batch_shape, p.queries, p.heads, p.v_head_dim), p.dtype).swapaxes(-2, -3)
    else:
        output = p.xp.empty(shape, p.dtype)
    lse = p.xp.empty(shape[:-1], p.computing)
    rows = RowStatistics(p.xp.empty(lse.shape, lse.dtype), p.xp.empty(lse.shape, lse.dtype))
    if not lse.size:
        return output, lse, rows
    block = launch.attention(p, device)
    block.view("output", output, p.batch_shape)
    block.pointer("lse", lse)
    block.pointer("shift", rows.shift)
    block.pointer("row_scale", rows.scale)
    traits = launch.traits(p, device)
    plans = plan_forward(p.sizes, traits, device.facts())
    if len(plans) > 1:
        block.room("partials", partial_size(p.sizes, traits, plans[0].splits))
    for plan in plans:
        block.run(plan)
    return output, lse, rows


def attention_weights(problem: AttentionProblem, rows: RowStatistics, average: bool) -> Array:
    """Weights after dropout: (*batch, H, L, T), or averaged over the heads (*batch, L, T)."""
    p, device = problem, runtime.of(problem.xp)
    heads = 1 if average else p.heads
    weights = p.xp.zeros((*p.batch_shape, heads, p.queries, p.keys), p.dtype)
    if weights.size and p.heads:
        block = launch.attention(p, device)
        traits = launch.traits(p, device)
        _statistics(block, p, rows, traits)
        block.view("target", weights, p.batch_shape)
        target = (p.batch, heads, p.queries, p.keys)
        _run_weights(block, AVERAGE if average else WEIGHTS, target, p, traits)
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
    """See `mha.cpu.attention_backward`."""
    p, device = problem, runtime.of(problem.xp)
    some = p.batch * p.heads * p.queries * p.keys
    make = p.xp.empty if some else p.xp.zeros
    gradients = [make((*p.batch_shape, *x.shape[-3:]), p.dtype) for x in (p.query, p.key, p.value)]
    masks = [make(shape, p.computing) for shape in mask_shapes]
    grad_query, grad_key, grad_value = gradients
    if not some:
        return grad_query, grad_key, grad_value, masks
    block = launch.attention(p, device)
    traits = launch.traits(p, device, grad_output, anything=grad_weights is not None)
    facts = device.facts()
    _statistics(block, p, rows, traits)
    block.pointer("delta", p.xp.empty((*p.batch_shape, p.heads, p.queries), p.computing))
    block.view("output", output, p.batch_shape)
    block.view("grad_output", grad_output, p.batch_shape)
    block.run(plan_rows("attention_delta", p.sizes, traits, facts))
    if grad_weights is not None:
        everywhere = p.xp.broadcast_to(grad_weights, (*p.batch_shape, p.heads, p.queries, p.keys))
        block.view("grad_weights", everywhere, p.batch_shape)
        block.set(grad_weights_scale=grad_weights_scale)
        _run_weights(block, DELTA, (p.batch, p.heads, p.queries, p.keys), p, traits)
    for name, gradient in zip(("query", "key", "value"), gradients, strict=True):
        block.view(f"grad_{name}", gradient, p.batch_shape)
    for plan in plan_backward(p.sizes, traits, facts):
        block.run(plan)
    for gradient in masks:
        batch, heads, queries, keys = gradient.shape
        block.view("target", gradient, (batch,))
        _run_weights(block, MASK_GRADIENT, (batch, heads, queries, keys), p, traits)
    return grad_query, grad_key, grad_value, masks


def _statistics(block: launch.Launch, problem: AttentionProblem, rows: RowStatistics, traits: Traits) -> None:
    """The rows' statistics; a log-sum-exp that large scores have made coarse is made up for by a pass over the scores.

    The CPU looks whether there are any. Here that would wait for the device, so the pass is always made.
    """
    p = problem
    block.pointer("shift", p.xp.ascontiguousarray(rows.shift, p.computing))
    if rows.scale is not None:
        block.pointer("row_scale", rows.scale)
        return
    block.pointer("row_scale", p.xp.empty(rows.shift.shape, p.computing))
    _run_weights(block, ROW_SCALE, (p.batch, p.heads, p.queries, p.keys), p, traits)


def _run_weights(
    block: launch.Launch, mode: int, target: tuple[int, int, int, int], problem: AttentionProblem, traits: Traits
) -> None:
    batch, heads, rows, keys = target
    block.set(target_batch=batch, target_heads=heads, target_rows=rows, target_keys=keys)
    block.run(plan_weights(mode, target, problem.sizes, traits, block.runtime.facts()))


def product(left: Matrix, right: Matrix, out: Matrix, bias: Array | None = None) -> None:
    """out = left @ right + bias, summed in the computing dtype of the operands' own."""
    (m, _), n = left.shape, right.shape[1]
    if m and n:
        launch.product(left, right, out, bias, runtime.of(array_module(out.array)))


def pack(right: Matrix) -> Matrix:
    """The right operand of many products, contiguous."""
    dense = right.dense()
    if not (dense.flags.c_contiguous or dense.flags.f_contiguous):
        dense = array_module(dense).ascontiguousarray(dense)
    return Matrix(dense, (0,), (1,))


def residual_norm(
    x: Array, dropout: Dropout | None = None, residual: Array | None = None, norm: Norm | None = None
) -> tuple[Array, Array]:
    """norm(total) and total = dropout(x) + residual, (N, L, E) each; without a norm both are one array."""
    xp = array_module(x)
    plain = dropout is None and residual is None
    output = xp.empty(x.shape, x.dtype)
    total = output if norm is None else x if plain else xp.empty(x.shape, x.dtype)
    if x.size:
        arrays = {"x": x, "residual": residual, "output": output, "total": None if norm is None or plain else total}
        plan = plan_residual_norm(x.shape[0] * x.shape[1], x.shape[2], STORAGE[x.dtype])
        launch.residual_norm(arrays, None, dropout, norm, plan, runtime.of(xp))
    return output, total


def residual_norm_backward(
    grad_output: Array, total: Array, norm: Norm, dropout: Dropout | None = None
) -> tuple[Array, Array, Array, Array]:
    """Gradients of total, which is that of the residual, of x, and of scale and bias in the computing dtype."""
    xp, computing = array_module(total), COMPUTING[total.dtype]
    of_total = xp.empty(total.shape, total.dtype)
    of_x = of_total if dropout is None else xp.empty(total.shape, total.dtype)
    sums = xp.zeros(total.shape[2], computing), xp.zeros(total.shape[2], computing)
    if total.size:
        arrays = {"total": total, "output": grad_output, "residual": of_total, "x": None if dropout is None else of_x}
        plan = plan_residual_norm_backward(total.shape[0] * total.shape[1], total.shape[2], STORAGE[total.dtype])
        launch.residual_norm(arrays, sums, dropout, norm, plan, runtime.of(xp))
    return of_total, of_x, *sums
