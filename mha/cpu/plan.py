"""Every choice of the CPU backend, as pure functions of the problem's sizes: which kernel, tile sizes, threads.

Whatever here depends on the number of threads leaves the results' bits alone: a row's sums do not depend on the
panel it lies in, and the fused and the separate backward take the same sums in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mha.problem import Sizes

#: Below this many floating-point operations waking the pool costs more than it gains (some ten microseconds).
_SMALL_WORK = 3_000_000
#: Rows per key head up to which a call is bound by memory, and lanes along the features pay.
_DECODE_ROWS = 8
#: Bytes of a wide panel of queries, which the scores of every few keys read anew from the first cache. With a head of
#: 128, 2048 queries and keys, float64 is 1.05 times as fast with panels of three vectors as with four; float32, whose
#: tiles ask for their next rows, 0.96 to 1.01 times.
_QUERY_PANEL = 24 * 2**10
#: Converting a block of float16 pays for as many queries as there can be: 1 x 16 x 2048 x 128 1.06 times as fast with
#: four panels of four vectors as with three of three, 1 x 12 x 512 x 64 1.02 times as with two of four.
_CONVERTED_PANELS = 4
#: From so many keys on a wide panel takes blocks of 128: 8192 keys 1.03 times as fast. Under a causal mask half of a
#: block is computed in vain, so with fewer keys smaller blocks win.
_LONG = 1024
#: Vectors of the scores of a decode, 256 keys in float32: what is read from end to end between two softmaxes. With one
#: query a key head and 2 048 / 16 384 keys 8 vectors are 1.07 / 1.05 times as fast as 4, and 16 are 1.09 / 1.08 times.
_DECODE_VECTORS = 16
#: Keys that one split of a decode covers at least.
_SPLIT_KEYS = 256
#: Splits are made until there are this many work items, whatever the number of threads.
_DECODE_ITEMS = 32
#: Scratch for the query gradient of the fused backward, all threads together.
_FUSED_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Facts:
    """What a plan depends on besides the problem: lanes of a vector, bytes of a real, threads; and the kernels.

    `vectors` is the most of a panel, which the registers decide.
    """

    lanes: int
    itemsize: int
    threads: int
    kernels: Any = None
    #: Whether operands are bfloat16 and the kernels multiply pairs of them in one instruction.
    paired: bool = False
    vectors: int = 4
    #: Whether keys and values are converted, block by block, for each item of work.
    converted: bool = False


@dataclass(frozen=True)
class AttentionPlan:
    """How one kernel runs."""

    kernel: str
    threads: int
    vectors: int
    panels: int
    key_block: int
    splits: int = 1
    fused: bool = False
    paired: bool = False
    why: str = ""


def plan_forward(sizes: Sizes, facts: Facts) -> AttentionPlan:
    """Output and log-sum-exp."""
    threads = _threads(sizes.flops, facts)
    if sizes.rows <= _DECODE_ROWS:
        splits = _splits(sizes)
        items = sizes.batch * sizes.kv_heads * splits
        return AttentionPlan(
            "attention_decode", min(threads, items), _DECODE_VECTORS, panels=1, key_block=max(sizes.queries, 1),
            splits=splits, why=f"{sizes.rows} query rows a key head: memory decides, keys in {splits} parts",
        )  # fmt: skip
    itemsize = 2 if facts.paired else facts.itemsize
    wide = facts.vectors * facts.lanes * itemsize * sizes.head_dim > _QUERY_PANEL
    most = min(3 if wide and itemsize == 8 else 4, facts.vectors)
    vectors = min(most, _ceil(sizes.rows, facts.lanes))
    heads = sizes.batch * sizes.kv_heads
    panels = _CONVERTED_PANELS if facts.converted else 3 if most == 3 else 2
    while panels > 1 and heads * _ceil(sizes.rows, panels * vectors * facts.lanes) < 4 * threads:
        panels -= 1
    items = heads * _ceil(sizes.rows, panels * vectors * facts.lanes)
    key_block = 128 if wide and sizes.keys >= _LONG else 64
    return AttentionPlan(
        "attention_forward", min(threads, items), vectors, panels, key_block, paired=facts.paired,
        why=f"{items} row blocks of {panels * vectors * facts.lanes} queries",
    )  # fmt: skip


def plan_backward(sizes: Sizes, facts: Facts) -> list[AttentionPlan]:
    """Gradients of query, key and value: one fused kernel, or two where heads are too few to share out."""
    threads = _threads(5 * sizes.flops // 2, facts)
    heads = sizes.batch * sizes.kv_heads
    vectors = min(facts.vectors, _ceil(sizes.keys, facts.lanes))
    columns = _ceil(sizes.head_dim, facts.lanes) * facts.lanes
    scratch = min(threads, heads) * sizes.rows * columns * facts.itemsize
    fused = (heads >= 2 * threads or threads == 1) and scratch <= _FUSED_BYTES
    items = heads if fused else heads * _ceil(sizes.keys, vectors * facts.lanes)
    why = f"{heads} key heads for {threads} threads, {scratch} bytes if fused"
    keys = AttentionPlan("attention_backward", min(threads, items), vectors, 1, 64, fused=fused, why=why)
    if fused:
        return [keys]
    # The blocks of keys over which the fused kernel sums the gradient of the query: equal bits.
    key_block = vectors * facts.lanes
    vectors = min(facts.vectors, _ceil(sizes.rows, facts.lanes))
    items = heads * _ceil(sizes.rows, vectors * facts.lanes)
    return [keys, AttentionPlan("attention_backward_query", min(threads, items), vectors, 1, key_block, why=why)]


def plan_rows(kernel: str, sizes: Sizes, facts: Facts) -> AttentionPlan:
    """The weights, their kin, and the row term of the backward."""
    vectors = min(facts.vectors, _ceil(sizes.queries, facts.lanes))
    return AttentionPlan(kernel, _threads(sizes.flops, facts), vectors, 1, key_block=64)


@dataclass(frozen=True)
class RowsPlan:
    """How the rows of an output are shared out."""

    threads: int
    row_block: int
    blocks: int


#: At most so many blocks of rows, each with its own sums; some per thread of a large machine.
_ROW_BLOCKS = 256
#: Below this many elements the calling thread works alone.
_SMALL_ROWS = 100_000


def plan_residual_norm(rows: int, features: int, facts: Facts) -> RowsPlan:
    """Dropout, residual link and layer norm of (N * L, E); which rows are a block does not depend on the threads."""
    row_block = max(16, _ceil(rows, _ROW_BLOCKS))
    blocks = _ceil(rows, row_block)
    threads = facts.threads if rows * features > _SMALL_ROWS else 1
    return RowsPlan(min(threads, blocks), row_block, blocks)


@dataclass(frozen=True)
class ProductPlan:
    """How one matrix product runs."""

    threads: int
    vectors: int
    row_block: int
    panels: int
    k_block: int
    in_place: bool
    paired: bool = False


#: Rows of `left` and panels of `right` of an item, so that each panel is read from the second cache for many rows. The
#: cube of 4096, GFLOP/s: 96 rows x 8 panels 429, 192 x 4 454, 384 x 4 462; but 1024 x 768 x 768 452, 467, 443.
_ROWS, _PANELS = 192, 4
#: Where these are too few items for the threads. Both are whole tiles of AMX, whose sums differ from those beside them.
_FEW_ROWS = 96


def plan_product(m: int, n: int, k: int, right_in_place: bool, facts: Facts) -> ProductPlan:
    """`right_in_place`: whether the right operand's rows can serve as panels where they lie."""
    threads = _threads(2 * m * n * k, facts)
    vectors = min(facts.vectors, _ceil(n, facts.lanes))
    panels_in_all = _ceil(n, vectors * facts.lanes)
    # Packing costs as much as a few rows of the product: with fewer rows it does not pay.
    in_place = right_in_place and m <= 24
    rows, panels = _ROWS, min(_PANELS, panels_in_all)
    while _ceil(m, rows) * _ceil(panels_in_all, panels) < 4 * threads and (rows > _FEW_ROWS or panels > 1):
        if rows > _FEW_ROWS:
            rows = _FEW_ROWS
        else:
            panels = _ceil(panels, 2)
    row_block = min(rows, max(m, 1))
    return ProductPlan(threads, vectors, row_block, panels, min(256, max(k, 1)), in_place, facts.paired)


def turn_round(m: int, n: int, right_by_columns: bool, facts: Facts) -> bool:
    """Whether to compute the transpose of a product whose right operand has contiguous columns.

    With few rows packing such an operand takes longer than the product. Against 768 x 768 float32 weights stored by
    rows, us turned / packed: one row 118 / 243, four 81 / 165, sixteen 85 / 190.
    """
    return right_by_columns and m <= facts.lanes < n


def _threads(flops: int, facts: Facts) -> int:
    return 1 if flops < _SMALL_WORK else facts.threads


def _splits(sizes: Sizes) -> int:
    heads = max(sizes.batch * sizes.kv_heads, 1)
    return max(1, min(_ceil(_DECODE_ITEMS, heads), sizes.keys // _SPLIT_KEYS))


def _ceil(a: int, b: int) -> int:
    return max(1, -(-a // b))
