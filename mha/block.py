"""The parameter block of one kernel call under construction: problem -> the fields that CPU and GPU kernels share.

The block is the struct of `mha.params`; whose memory the addresses in it belong to is the backend's affair, which hands
in a `Memory`.
"""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mha.masks import MaskSpec
from mha.params import STORAGE, Table
from mha.problem import AttentionProblem, Dropout, Norm, usable
from mha.random import threshold

Array = NDArray[Any]


class Memory(Protocol):
    """Where the arrays of a block lie."""

    @property
    def xp(self) -> ModuleType:
        """Their library."""

    def address(self, x: Array) -> int:
        """Of the first element."""

    def upload(self, x: NDArray[np.int64]) -> Array:
        """A NumPy array as one of the library's."""


class Block:
    """A parameter block, with everything it points to kept alive.

    Plain lists and one `struct` call: filling a NumPy record field by field took most of a small layer's time.
    """

    def __init__(self, table: Table, memory: Memory, computing: np.dtype[Any]) -> None:
        self.table = table
        self.memory = memory
        self.computing = computing
        self.values: list[Any] = [0] * len(table.names)
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
            self.values[self.table.index[name]] = self.memory.address(x)

    def view(self, name: str, x: Array, batch_shape: tuple[int, ...]) -> None:
        """An array (..., heads, rows, columns) whose batch axes broadcast to `batch_shape`."""
        self._alive.append(x)
        stride, offsets = batch_stride(x, batch_shape)
        address = 0
        if offsets is not None:
            uploaded = self.memory.upload(offsets)
            self._alive.append(uploaded)
            address = self.memory.address(uploaded)
        members = (self.memory.address(x), address, stride, *element_strides(x)[-3:], STORAGE[x.dtype])
        self.fill(f"{name}.data", members)

    def packed(self) -> bytearray:
        """The block as it stands."""
        return self.table.pack(self.values)


def element_strides(x: Array) -> tuple[int, ...]:
    """Strides in elements."""
    size = x.itemsize
    return tuple([stride // size for stride in x.strides])


def batch_stride(x: Array, batch_shape: tuple[int, ...]) -> tuple[int, NDArray[np.int64] | None]:
    """Distance of neighbouring samples in elements, or, where it varies, the start of each sample."""
    if len(batch_shape) == 1 and x.shape[:-3] == batch_shape:
        return x.strides[0] // x.itemsize, None
    if math.prod(x.shape[:-3]) == 1:
        return 0, None
    own = (1,) * (len(batch_shape) + 3 - x.ndim) + x.shape[:-3]
    strides = (0,) * (len(batch_shape) + 3 - x.ndim) + element_strides(x)[:-3]
    steps = [
        (size, stride if n != 1 else 0)
        for size, n, stride in zip(batch_shape, own, strides, strict=True)
        if size != 1
    ]  # fmt: skip
    inner = steps[-1][1]
    if all(outer[1] == size * stride for outer, (size, stride) in itertools.pairwise(steps)):
        return inner, None
    offsets = np.zeros((), np.int64)
    for size, stride in steps:
        offsets = np.add.outer(offsets, np.arange(size, dtype=np.int64) * stride)
    return 0, np.ascontiguousarray(offsets).reshape(-1)


def fill_attention(block: Block, problem: AttentionProblem) -> None:
    """The part that every attention kernel reads: sizes, inputs, masks, dropout."""
    p = problem
    block.set(batch=p.batch, heads=p.heads, kv_heads=p.kv_heads, queries=p.queries, keys=p.keys)
    block.set(head_dim=p.head_dim, v_head_dim=p.v_head_dim, extra=p.mask.extra, softcap=p.softcap or 0.0)
    # Nothing comes between scale and softmax: the softmax scales what it reads, and saves a pass over the scores.
    at_once = p.scale > 0 and not p.softcap and p.mask.key_bias is None and p.mask.pair_bias is None
    block.set(score_scale=1.0 if at_once else p.scale, softmax_scale=p.scale if at_once else 1.0)
    for name, x in (("query", p.query), ("key", p.key), ("value", p.value)):
        block.view(name, x, p.batch_shape)
    _fill_masks(block, p.mask, p)
    _fill_dropout(block, p.dropout)
    block.set(total_heads=p.heads, grad_weights_scale=1.0)


def fill_norm(
    block: Block, arrays: dict[str, Array | None], shape: tuple[int, ...], dropout: Dropout | None, norm: Norm | None
) -> None:
    """Sizes, the arrays (N, L, E) by the names of the block, dropout and norm of `residual_norm` and its backward."""
    block.set(batch=shape[0], queries=shape[1], features=shape[2])
    for name, array in arrays.items():
        if array is not None:
            block.view(name, array[:, None], shape[:1])
    if norm is not None:
        block.set(normalise=1, epsilon=float(norm.epsilon))
        for name, x in (("scale", norm.scale), ("bias", norm.bias)):
            block.pointer(name, None if x is None else _contiguous(block, x, block.computing))
    _fill_dropout(block, dropout)


def _fill_masks(block: Block, mask: MaskSpec, p: AttentionProblem) -> None:
    block.set(left=mask.left, right=mask.right, pair_hides=mask.pair_hides)
    if isinstance(mask.offset, int):
        block.set(position=mask.offset)
    else:
        block.pointer("offset", _contiguous(block, mask.offset, np.int64))
    if mask.row_ranges is not None:
        ranges = _contiguous(block, mask.row_ranges, np.int64)
        block.pointer("row_low", ranges[0])
        block.pointer("row_high", ranges[1])
    fields = {"key_lengths": np.int64, "query_lengths": np.int64, "key_keep": np.bool_, "key_bias": block.computing}
    for name, dtype in fields.items():
        x = getattr(mask, name)
        block.pointer(name, None if x is None else _contiguous(block, x, dtype))
    for name in ("pair_keep", "pair_bias"):
        pairs = getattr(mask, name)
        if pairs is not None:
            block.view(name, usable(pairs, block.memory.xp), p.batch_shape)


def _fill_dropout(block: Block, dropout: Dropout | None) -> None:
    block.set(keep_scale=1.0)
    if dropout is not None and dropout.state is not None:
        seed = dropout.state.seed & 0xFFFFFFFFFFFFFFFF
        seed -= (seed >> 63) << 64  # two's complement
        block.set(dropout=1, threshold=threshold(dropout.p), keep_scale=dropout.factor)
        block.set(seed=seed, dropout_offset=dropout.state.offset)


def _contiguous(block: Block, x: Array, dtype: Any) -> Array:
    return block.memory.xp.ascontiguousarray(x, dtype)
