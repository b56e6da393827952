"""Problem and plan -> parameter block, memory, kernel call. The only place of the CPU backend that allocates."""

from __future__ import annotations

import math
import threading
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha.cpu.plan import AttentionPlan, Facts, ProductPlan, RowsPlan
from mha.masks import MaskSpec
from mha.matrix import Matrix
from mha.params import ATTENTION, NORM, PRODUCT, STORAGE, Table
from mha.problem import COMPUTING, AttentionProblem, Dropout, Norm, usable
from mha.random import threshold

Array = NDArray[Any]

_LINE = 64

#: How the right operand of a product lies; 0 is to be packed first.
_IN_PLACE, _PACKED = 1, 2


class PackedMatrix(NamedTuple):
    """A matrix together with its panels, for one instruction-set level."""

    matrix: Matrix
    memory: Array
    address: int
    kernels: ModuleType

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.matrix.shape


class Launch:
    """A parameter block under construction, with everything it points to kept alive.

    Plain lists and one `struct` call: filling a NumPy record field by field took most of a small layer's time.
    """

    def __init__(self, table: Table, kernels: ModuleType, computing: np.dtype[Any]) -> None:
        self.table = table
        self.kernels = kernels
        self.values: list[Any] = [0] * len(table.names)
        self.double = computing == np.float64
        self.computing = computing
        self._alive: list[Array] = []

    def set(self, **fields: Any) -> None:
        """Plain numbers."""
        index = self.table.index
        for name, value in fields.items():
            self.values[index[name]] = value

    def fill(self, name: str, members: tuple[int, ...]) -> None:
        """The members of a nested struct, whose first field is `name`."""
        start = self.table.index[name]
        self.values[start : start + len(members)] = members

    def pointer(self, name: str, x: Array | None) -> None:
        """The address of a contiguous array; None is NULL."""
        if x is not None:
            self._alive.append(x)
            self.values[self.table.index[name]] = x.ctypes.data

    def view(self, name: str, x: Array, batch_shape: tuple[int, ...]) -> None:
        """An array (..., heads, rows, columns) whose batch axes broadcast to `batch_shape`."""
        offsets = _offsets(x, batch_shape)
        self._alive += (x, offsets)
        members = (x.ctypes.data, offsets.ctypes.data, *_element_strides(x)[-3:], STORAGE[x.dtype])
        self.fill(f"{name}.data", members)

    def run(self, kernel: str, threads: int) -> int:
        """Allocate what the kernel asks for and call it; returns the size of its team of threads."""
        block = self.packed()
        need = getattr(self.kernels, f"{kernel}_scratch")(block, self.double)
        memory, address = _aligned(need * threads)
        for name, value in (("threads", threads), ("scratch_bytes", need), ("scratch", address)):
            self.table.put(block, name, value)
        team = int(getattr(self.kernels, kernel)(block, self.double))
        del memory  # alive until here
        return team

    def packed(self) -> bytearray:
        """The block as it stands."""
        return self.table.pack(self.values)

    def room(self, name: str, size: int) -> None:
        """Memory for a field of the block, aligned to a cache line."""
        memory, address = _aligned(size)
        self._alive.append(memory)
        self.values[self.table.index[name]] = address


def _aligned(size: int) -> tuple[Array, int]:
    """Memory, and the address of its first cache line."""
    memory = np.empty(size + _LINE, np.uint8)
    return memory, (int(memory.ctypes.data) + _LINE - 1) // _LINE * _LINE


def _offsets(x: Array, batch_shape: tuple[int, ...]) -> Array:
    """Where each sample starts, in elements."""
    if len(batch_shape) == 1 and x.shape[:-3] == batch_shape:
        return np.arange(batch_shape[0], dtype=np.int64) * (x.strides[0] // x.itemsize)
    axes = np.broadcast_to(x, (*batch_shape, *x.shape[-3:]))
    offsets = np.zeros((), np.int64)
    for size, stride in zip(batch_shape, axes.strides, strict=False):
        offsets = np.add.outer(offsets, np.arange(size, dtype=np.int64) * (stride // x.itemsize))
    return np.ascontiguousarray(offsets).reshape(-1)


def attention(problem: AttentionProblem, kernels: ModuleType) -> Launch:
    """The part of the block that every attention kernel reads: sizes, inputs, masks, dropout."""
    p = problem
    launch = Launch(ATTENTION, kernels, p.computing)
    launch.set(batch=p.batch, heads=p.heads, kv_heads=p.kv_heads, queries=p.queries, keys=p.keys)
    launch.set(head_dim=p.head_dim, v_head_dim=p.v_head_dim, extra=p.mask.extra, softcap=p.softcap or 0.0)
    exact = p.scale > 0 and math.frexp(p.scale)[0] == 0.5
    launch.set(operand_scale=p.scale if exact else 1.0, score_scale=1.0 if exact else p.scale)
    for name, x in (("query", p.query), ("key", p.key), ("value", p.value)):
        launch.view(name, x, p.batch_shape)
    _masks(launch, p.mask, p)
    _dropout(launch, p.dropout)
    launch.set(total_heads=p.heads, grad_weights_scale=1.0)
    return launch


def follow(launch: Launch, plan: AttentionPlan) -> None:
    """The plan's part of the block."""
    launch.set(vectors=plan.vectors, panels=plan.panels, key_block=plan.key_block)
    launch.set(splits=plan.splits, fused=plan.fused, main_thread=_in_main_thread())


def _masks(launch: Launch, mask: MaskSpec, p: AttentionProblem) -> None:
    launch.set(left=mask.left, right=mask.right, pair_hides=mask.pair_hides)
    whole = np.int64
    if not isinstance(mask.offset, int) or mask.offset:
        launch.pointer("offset", np.ascontiguousarray(np.broadcast_to(mask.offset, (p.batch,)), whole))
    if mask.row_ranges is not None:
        ranges = np.ascontiguousarray(mask.row_ranges, whole)
        launch.pointer("row_low", ranges[0])
        launch.pointer("row_high", ranges[1])
    for name in ("key_lengths", "query_lengths"):
        lengths = getattr(mask, name)
        launch.pointer(name, None if lengths is None else np.ascontiguousarray(lengths, whole))
    if mask.key_keep is not None:
        launch.pointer("key_keep", np.ascontiguousarray(mask.key_keep, np.bool_))
    if mask.key_bias is not None:
        launch.pointer("key_bias", np.ascontiguousarray(mask.key_bias, launch.computing))
    for name in ("pair_keep", "pair_bias"):
        pairs = getattr(mask, name)
        if pairs is not None:
            launch.view(name, usable(pairs, np), p.batch_shape)


def _dropout(launch: Launch, dropout: Dropout | None) -> None:
    launch.set(keep_scale=1.0)
    if dropout is not None and dropout.state is not None:
        seed = dropout.state.seed & 0xFFFFFFFFFFFFFFFF
        seed -= (seed >> 63) << 64  # two's complement
        launch.set(dropout=1, threshold=threshold(dropout.p), keep_scale=dropout.factor)
        launch.set(seed=seed, dropout_offset=dropout.state.offset)


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
    launch.set(batch=shape[0], queries=shape[1], features=shape[2], row_block=plan.row_block)
    for name, array in arrays.items():
        if array is not None:
            launch.view(name, array[:, None], shape[:1])
    if norm is not None:
        launch.set(normalise=1, epsilon=float(norm.epsilon))
        for name, x in (("scale", norm.scale), ("bias", norm.bias)):
            launch.pointer(name, None if x is None else np.ascontiguousarray(x, launch.computing))
    if sums is not None:
        launch.pointer("grad_scale", sums[0])
        launch.pointer("grad_bias", sums[1])
        launch.room("partials", plan.blocks * 2 * shape[2] * launch.computing.itemsize)
    _dropout(launch, dropout)
    launch.set(main_thread=_in_main_thread())
    launch.run(kernel, plan.threads)


def product(
    left: Matrix, right: Matrix | PackedMatrix, out: Matrix, bias: Array | None, plan: ProductPlan, facts: Facts
) -> None:
    """out = left @ right + bias"""
    launch = Launch(PRODUCT, facts.kernels, COMPUTING[out.array.dtype])
    launch.set(m=left.shape[0], k=left.shape[1], n=right.shape[1], main_thread=_in_main_thread())
    source = right.matrix if isinstance(right, PackedMatrix) else right
    for name, matrix in (("left", left), ("right", source), ("out", out)):
        launch.fill(f"{name}.data", _matrix_view(matrix))
    launch.pointer("bias", None if bias is None else np.ascontiguousarray(bias))
    launch.set(vectors=plan.vectors, row_block=plan.row_block, panels=plan.panels, k_block=plan.k_block)
    if isinstance(right, PackedMatrix):
        launch.set(right_lies=_PACKED, packed=right.address)
    elif plan.in_place:
        launch.set(right_lies=_IN_PLACE)
    else:
        launch.room("packed", _packed_size(right, plan, facts))
    launch.run("product", plan.threads)


def pack(right: Matrix, plan: ProductPlan, facts: Facts) -> PackedMatrix:
    """The right operand of products, in panels once and for all."""
    launch = Launch(PRODUCT, facts.kernels, COMPUTING[right.array.dtype])
    k, n = right.shape
    launch.set(k=k, n=n, vectors=plan.vectors, row_block=1, panels=1, k_block=1, main_thread=_in_main_thread())
    launch.fill("right.data", _matrix_view(right))
    memory, address = _aligned(_packed_size(right, plan, facts))
    launch.set(packed=address)
    launch.run("product", plan.threads)
    return PackedMatrix(right, memory, address, facts.kernels)


def _packed_size(right: Matrix, plan: ProductPlan, facts: Facts) -> int:
    k, n = right.shape
    width = plan.vectors * facts.lanes
    return -(-n // width) * width * k * facts.itemsize


def _matrix_view(matrix: Matrix) -> tuple[int, ...]:
    x = matrix.array
    strides = _element_strides(x)
    fields = [x.ctypes.data, STORAGE[x.dtype]]
    for axes in (matrix.row_axes, matrix.column_axes):
        *outer, inner = axes
        size = max(x.shape[inner], 1)
        fields += [size, strides[outer[0]] if outer else size * strides[inner], strides[inner]]
    return tuple(fields)


def _element_strides(x: Array) -> tuple[int, ...]:
    size = x.itemsize
    return tuple([stride // size for stride in x.strides])


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
