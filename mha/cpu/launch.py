"""Problem and plan -> parameter block, memory, kernel call. The only place of the CPU backend that allocates."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha.block import Block, element_strides, fill_attention, fill_norm
from mha.cpu import load, replay
from mha.cpu.plan import AttentionPlan, Facts, ProductPlan, RowsPlan
from mha.cpu.threads import get_num_threads
from mha.matrix import Matrix
from mha.params import ATTENTION, NORM, PRODUCT, STORAGE, Table
from mha.problem import COMPUTING, AttentionProblem, Dropout, Norm

Array = NDArray[Any]

_LINE = 64

#: How the right operand of a product lies; 0 is to be packed first.
_IN_PLACE, _PACKED = 1, 2


class PackedMatrix(NamedTuple):
    """A matrix together with its panels, for one instruction-set level."""

    matrix: Matrix
    memory: Array
    kernels: ModuleType

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.matrix.shape


class _HostMemory:
    """NumPy's."""

    xp = np

    def address(self, x: Array) -> int:
        """Of the first element."""
        return int(x.ctypes.data)

    def upload(self, x: Array) -> Array:
        """Nothing to do."""
        return x


_MEMORY = _HostMemory()


class Launch(Block):
    """A parameter block and the call of a kernel with it."""

    def __init__(self, table: Table, kernels: ModuleType, computing: np.dtype[Any]) -> None:
        super().__init__(table, _MEMORY, computing)
        self.kernels = kernels
        self.double = computing == np.float64

    def run(self, kernel: str, threads: int) -> int:
        """Allocate what the kernel asks for and call it; returns the size of its team of threads."""
        block = self.packed()
        need = getattr(self.kernels, f"{kernel}_scratch")(block, self.double)
        memory = _aligned(need * threads)
        for name, value in (("threads", threads), ("scratch_bytes", need), ("scratch", memory.ctypes.data)):
            self.table.put(block, name, value)
        entry = getattr(self.kernels, kernel)
        team = int(entry(block, self.double))
        replay.note(self.table, entry, block, self.double, [*self._alive, memory])
        return team

    def room(self, name: str, size: int) -> None:
        """Memory for a field of the block, aligned to a cache line."""
        self.pointer(name, _aligned(size))

    def matrix(self, name: str, matrix: Matrix) -> None:
        """An operand or the result of a product."""
        self._alive.append(matrix.array)
        self.fill(f"{name}.data", _matrix_view(matrix))


def _aligned(size: int) -> Array:
    """Bytes from the start of a cache line."""
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size]


def facts(dtype: np.dtype[Any]) -> Facts:
    """The chosen kernels, and what plans for arrays of a dtype depend on with them."""
    kernels, itemsize = load.kernels(load.chosen_level()), COMPUTING[dtype].itemsize
    paired = bool(kernels.PAIRED) and dtype.name == "bfloat16"
    return Facts(
        kernels.VECTOR_BYTES // itemsize, itemsize, get_num_threads(), kernels, paired, kernels.TILE_VECTORS,
        converted=dtype.itemsize < itemsize and not paired,
    )  # fmt: skip


def attention(problem: AttentionProblem, kernels: ModuleType) -> Launch:
    """The part of the block that every attention kernel reads."""
    launch = Launch(ATTENTION, kernels, problem.computing)
    fill_attention(launch, problem)
    return launch


def follow(launch: Launch, plan: AttentionPlan) -> None:
    """The plan's part of the block."""
    launch.set(vectors=plan.vectors, panels=plan.panels, key_block=plan.key_block)
    launch.set(splits=plan.splits, fused=plan.fused, paired=plan.paired, main_thread=_in_main_thread())


def residual_norm(
    kernel: str,
    arrays: dict[str, Array | None],
    sums: tuple[Array, Array] | None,
    dropout: Dropout | None,
    norm: Norm | None,
    plan: RowsPlan,
    facts: Facts,
) -> None:
    """`residual_norm` or its backward: `arrays` by the names of the block, (N, L, E) each; `sums` for the backward."""
    shape, dtype = next((x.shape, x.dtype) for x in arrays.values() if x is not None)
    launch = Launch(NORM, facts.kernels, COMPUTING[dtype])
    fill_norm(launch, arrays, shape, dropout, norm)
    launch.set(row_block=plan.row_block)
    if sums is not None:
        launch.pointer("grad_scale", sums[0])
        launch.pointer("grad_bias", sums[1])
        launch.room("partials", plan.blocks * 2 * shape[2] * launch.computing.itemsize)
    launch.set(main_thread=_in_main_thread())
    launch.run(kernel, plan.threads)


def product(
    left: Matrix,
    right: Matrix | PackedMatrix,
    out: Matrix,
    bias: Array | None,
    plan: ProductPlan,
    facts: Facts,
    bias_by_rows: bool = False,
) -> None:
    """out = left @ right + bias, of which every row or every column has its value."""
    launch = Launch(PRODUCT, facts.kernels, COMPUTING[out.array.dtype])
    launch.set(m=left.shape[0], k=left.shape[1], n=right.shape[1], main_thread=_in_main_thread())
    source = right.matrix if isinstance(right, PackedMatrix) else right
    for name, matrix in (("left", left), ("right", source), ("out", out)):
        launch.matrix(name, matrix)
    launch.pointer("bias", None if bias is None else np.ascontiguousarray(bias))
    launch.set(bias_by_rows=bias_by_rows, paired=plan.paired)
    launch.set(vectors=plan.vectors, row_block=plan.row_block, panels=plan.panels, k_block=plan.k_block)
    if isinstance(right, PackedMatrix):
        launch.set(right_lies=_PACKED, **{"right.data": 0})
        launch.pointer("packed", right.memory)
    elif plan.in_place:
        launch.set(right_lies=_IN_PLACE)
    else:
        launch.room("packed", _packed_size(right, plan, facts))
    launch.run("product", plan.threads)


def pack(right: Matrix, plan: ProductPlan, facts: Facts) -> PackedMatrix:
    """The right operand of products, in panels once and for all."""
    launch = Launch(PRODUCT, facts.kernels, COMPUTING[right.array.dtype])
    k, n = right.shape
    launch.set(k=k, n=n, vectors=plan.vectors, row_block=1, panels=1, k_block=1, paired=plan.paired)
    launch.set(main_thread=_in_main_thread())
    launch.matrix("right", right)
    memory = _aligned(_packed_size(right, plan, facts))
    launch.pointer("packed", memory)
    launch.run("product", plan.threads)
    return PackedMatrix(right, memory, facts.kernels)


def _packed_size(right: Matrix, plan: ProductPlan, facts: Facts) -> int:
    k, n = right.shape
    width = plan.vectors * facts.lanes
    rows = -(-k // 2) if plan.paired else k
    return -(-n // width) * width * rows * facts.itemsize


def _matrix_view(matrix: Matrix) -> tuple[int, ...]:
    x = matrix.array
    strides = element_strides(x)
    fields = [x.ctypes.data, STORAGE[x.dtype]]
    for axes in (matrix.row_axes, matrix.column_axes):
        *outer, inner = axes
        size = max(x.shape[inner], 1)
        if outer and strides[outer[0]] == size * strides[inner]:
            # One axis in memory, so that no block of rows ends where a sample does: such a block would be copied.
            size, outer = size * x.shape[outer[0]], []
        fields += [size, strides[outer[0]] if outer else size * strides[inner], strides[inner]]
    return tuple(fields)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
