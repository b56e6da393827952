"""Problem and plan -> parameter block, kernel launch. The only place of the GPU backend that touches the device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha.block import Block, fill_attention, fill_norm
from mha.gpu import load
from mha.gpu.plan import KernelPlan, RowsPlan
from mha.gpu.runtime import Runtime
from mha.gpu.tiles import ANYTHING, NOTHING_HIDDEN, RANGES, Traits
from mha.matrix import Matrix
from mha.params import ATTENTION, NORM, STORAGE, Table
from mha.precision import float32_by_tensor
from mha.problem import COMPUTING, AttentionProblem, Dropout, Norm

Array = NDArray[Any]


class Launch(Block):
    """A parameter block and the launch of kernels with it."""

    def __init__(self, table: Table, runtime: Runtime, computing: np.dtype[Any]) -> None:
        super().__init__(table, runtime, computing)
        self.runtime = runtime

    def run(self, plan: KernelPlan) -> None:
        """Launch the plan's kernel on the current stream."""
        kernel = load.kernel(self.runtime, plan)
        if self.table is ATTENTION:
            self.set(splits=plan.splits)
        self.runtime.launch(kernel, plan.grid, plan.threads, plan.shared, self.packed())

    def room(self, name: str, size: int) -> None:
        """Memory for a field of the block."""
        self.pointer(name, self.runtime.xp.empty(size, np.uint8))


def attention(problem: AttentionProblem, runtime: Runtime) -> Launch:
    """The part of the block that every attention kernel reads."""
    launch = Launch(ATTENTION, runtime, problem.computing)
    fill_attention(launch, problem)
    # Operands go to the matrix instructions as they lie in memory.
    launch.set(score_scale=problem.scale, softmax_scale=1.0)
    return launch


def traits(problem: AttentionProblem, runtime: Runtime, *others: Array, anything: bool = False) -> Traits:
    """What the specialisations of a problem have in common; `others` are copied to tiles like its own arrays."""
    p, facts = problem, runtime.facts()
    # Tiles of float64 for the matrix instructions need the memory that only parts have whose float64 is fast.
    by_tensor = {2: True, 4: float32_by_tensor(), 8: facts.shared_bytes > 2**17}
    tensor = facts.capability >= 80 and by_tensor[p.dtype.itemsize]
    return Traits(
        STORAGE[p.dtype], p.dtype.itemsize, p.computing.itemsize, tensor, ANYTHING if anything else _masks(p),
        p.dropout is not None, all(_aligned(x, runtime) for x in (p.query, p.key, p.value, *others)),
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


def residual_norm(
    arrays: dict[str, Array | None],
    sums: tuple[Array, Array] | None,
    dropout: Dropout | None,
    norm: Norm | None,
    plan: RowsPlan,
    runtime: Runtime,
) -> None:
    """`residual_norm` or its backward: `arrays` by the names of the block, (N, L, E) each; `sums` for the backward."""
    shape, dtype = next((x.shape, x.dtype) for x in arrays.values() if x is not None)
    launch = Launch(NORM, runtime, COMPUTING[dtype])
    fill_norm(launch, arrays, shape, dropout, norm)
    if sums is not None:
        launch.set(row_block=plan.row_block)
        launch.pointer("grad_scale", sums[0])
        launch.pointer("grad_bias", sums[1])
        launch.pointer("partials", runtime.xp.empty((plan.row_blocks, 2, shape[2]), launch.computing))
    for kernel in plan.kernels:
        launch.run(kernel)


def product(left: Matrix, right: Matrix, out: Matrix, bias: Array | None, runtime: Runtime) -> None:
    """out = left @ right + bias by the library's product of plain matrices.

    Of what it can do only that is used which CuPy hands to cuBLAS at once: two axes, one dtype, out contiguous. Half
    types are then summed in float32 and rounded; the bias is added to the rounded product.
    """
    xp = runtime.xp
    (m, k), n = left.shape, right.shape[1]
    left_rows, out_rows = _side_by_side(left.array, left.row_axes, out.array, out.row_axes)
    left_columns, right_rows = _side_by_side(left.array, left.column_axes, right.array, right.row_axes)
    right_columns, out_columns = _side_by_side(right.array, right.column_axes, out.array, out.column_axes)
    a = left.array.transpose(*left_rows, *left_columns).reshape(m, k)
    b = right.array.transpose(*right_rows, *right_columns).reshape(k, n)
    target = out.array.transpose(*out_rows, *out_columns)
    if m == n == 1:
        # CuPy has another kernel for one element, which rounds every half-precision product.
        a, b = a.astype(COMPUTING[a.dtype], copy=False), b.astype(COMPUTING[b.dtype], copy=False)
    if target.flags.c_contiguous and a.dtype == target.dtype:
        target = target.reshape(m, n)
        xp.matmul(a, b, out=target)
        if bias is not None:
            xp.add(target, bias, out=target)
        return
    value = xp.matmul(a, b).astype(target.dtype, copy=False).reshape(target.shape)
    if bias is None:
        target[...] = value
    else:
        xp.add(value, bias.reshape(target.shape[len(out_rows) :]), out=target)


def _side_by_side(x: Array, axes: tuple[int, ...], y: Array, others: tuple[int, ...]) -> Any:
    """Axes of two arrays that run together, in the order in which more of them are one axis in memory."""
    if len(axes) == len(others) == 2 and [x.shape[i] for i in axes] == [y.shape[i] for i in others]:
        given = _one_axis(x, *axes) + _one_axis(y, *others)
        if given < _one_axis(x, *reversed(axes)) + _one_axis(y, *reversed(others)):
            return axes[::-1], others[::-1]
    return axes, others


def _one_axis(x: Array, outer: int, inner: int) -> bool:
    return 1 in (x.shape[outer], x.shape[inner]) or x.strides[outer] == x.shape[inner] * x.strides[inner]
