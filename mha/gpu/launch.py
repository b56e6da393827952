"""Problem and plan -> parameter block, kernel launch. The only place of the GPU backend that touches the device."""

from __future__ import annotations

from typing import Any

import numpy as np

from mha.block import Block, fill_attention
from mha.gpu import load
from mha.gpu.plan import ANYTHING, NOTHING_HIDDEN, RANGES, KernelPlan, Traits
from mha.gpu.runtime import Runtime
from mha.params import ATTENTION, STORAGE, Table
from mha.problem import AttentionProblem


class Launch(Block):
    """A parameter block and the launch of kernels with it."""

    def __init__(self, table: Table, runtime: Runtime, computing: np.dtype[Any]) -> None:
        super().__init__(table, runtime, computing)
        self.runtime = runtime

    def run(self, plan: KernelPlan) -> None:
        """Launch the plan's kernel on the current stream."""
        kernel = load.kernel(self.runtime, plan)
        self.runtime.launch(kernel, plan.grid, plan.threads, plan.shared, self.packed())


def attention(problem: AttentionProblem, runtime: Runtime) -> Launch:
    """The part of the block that every attention kernel reads."""
    launch = Launch(ATTENTION, runtime, problem.computing)
    fill_attention(launch, problem)
    return launch


def traits(problem: AttentionProblem, runtime: Runtime) -> Traits:
    """What the specialisations of a problem have in common."""
    p = problem
    capability = runtime.facts().capability
    tensor = capability >= 80 and p.dtype != np.float32
    return Traits(
        STORAGE[p.dtype], p.dtype.itemsize, p.computing.itemsize, tensor, _masks(p), p.dropout is not None,
        all(_aligned(x, runtime) for x in (p.query, p.key, p.value)),
    )  # fmt: skip


def _masks(problem: AttentionProblem) -> int:
    mask = problem.mask
    from_memory = (mask.key_keep, mask.key_bias, mask.pair_keep, mask.pair_bias)
    # Only a positive factor lets the largest product be the largest score.
    if problem.softcap or problem.scale < 1e-30 or any(x is not None for x in from_memory):
        return ANYTHING
    ranges = (mask.row_ranges, mask.key_lengths, mask.query_lengths)
    if max(mask.left, mask.right) >= 0 or mask.extra or any(x is not None for x in ranges):
        return RANGES
    return NOTHING_HIDDEN


def _aligned(x: Any, runtime: Runtime) -> bool:
    """Whether every row is contiguous, of whole 16-byte pieces and begins at one."""
    size = x.itemsize
    if (x.strides[-1] != size and x.shape[-1] > 1) or x.shape[-1] * size % 16 or runtime.address(x) % 16:
        return False
    return all(stride % 16 == 0 for stride, n in zip(x.strides[:-1], x.shape[:-1], strict=True) if n > 1)
