"""The GPU backend: CUDA kernels, CuPy arrays. Its functions are those of every backend."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from mha.gpu import launch, runtime
from mha.gpu.plan import MOST_COLUMNS, plan_forward
from mha.problem import AttentionProblem, RowStatistics

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
    block.run(plan_forward(p.sizes, launch.traits(p, device), device.facts()))
    return output, lse, rows
