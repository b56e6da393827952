"""Every choice of the GPU backend, as pure functions of sizes, types and the device: which kernel, tiles, splits.

A tile is compiled in, so every plan is one specialisation. Sizes are rounded up to few values: head sizes to multiples
of 16, row blocks and key tiles to powers of two.

The registers decide on the tiles. Of a thread's 255, a result takes row_tiles * columns / 2, scores or their gradients
row_tiles * keys / 2, twice as many in float64. Two row tiles halve what the products read from shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from mha.gpu.runtime import DeviceFacts
from mha.gpu.tiles import ANYTHING, RANGES, SHARED, Tiles, Traits, defines, fitting, round_up
from mha.problem import Sizes

#: The largest head size.
MOST_COLUMNS = 256
#: Rows per key head up to which a call is bound by memory: those of one matrix instruction.
_DECODE_ROWS = 16
#: Blocks of a decode per multiprocessor, each one warp.
_DECODE_BLOCKS = 4
#: Keys that one split of a decode covers at least.
_SPLIT_KEYS = 256

#: Plans kept for calls of the same kind: making one takes longer than the rest of a call on the host.
_PLANS = 4096

#: Modes of the kernel attention_weights.
WEIGHTS, AVERAGE, MASK_GRADIENT, DELTA, ROW_SCALE = range(5)


@dataclass(frozen=True)
class KernelPlan:
    """How one kernel runs."""

    kernel: str
    stem: str
    defines: tuple[tuple[str, int], ...]
    grid: tuple[int, int]
    threads: int
    shared: int
    splits: int = 1
    why: str = ""


@lru_cache(_PLANS)
def plan_forward(sizes: Sizes, traits: Traits, facts: DeviceFacts) -> tuple[KernelPlan, ...]:
    """Output and log-sum-exp: one kernel, or for few rows a split one and one that combines the parts."""
    if sizes.rows <= _DECODE_ROWS:
        return _plan_decode(sizes, traits, facts)
    tiles = _forward_tiles(sizes, traits)
    if facts.capability >= 120 and tiles.columns > 64:
        traits = _with_ranges(traits)
    tiles = _tiles("attention_forward", tiles, sizes.rows, sizes.keys, traits, facts)
    blocks = sizes.batch * sizes.kv_heads * -(-sizes.rows // tiles.rows)
    why = f"{blocks} blocks of {tiles.rows} query rows, {tiles.keys} keys at a time"
    return (_plan("attention_forward", tiles, traits, blocks, tiles.dv // tiles.v_columns, why),)


def _with_ranges(traits: Traits) -> Traits:
    """From 10.0 on the assembler spills 12 to 96 bytes of some kernels that know that nothing is hidden, and nothing of
    those that look."""
    return traits._replace(masks=max(traits.masks, RANGES))


def _forward_tiles(sizes: Sizes, traits: Traits) -> Tiles:
    d, dv = round_up(sizes.head_dim, 16), round_up(sizes.v_head_dim, 16)
    widest, narrow = max(d, dv), traits.itemsize == 2
    if traits.real == 8:
        # 128 columns spill 8 to 24 bytes in some specialisations.
        return _of(d, dv, MOST_COLUMNS, 64, 1, 4, 32 if widest <= 64 else 16)
    most = 256 if narrow and traits.tensor else 128
    if widest > 128:
        return _of(d, dv, MOST_COLUMNS, most, 1, 8 if narrow else 4, 32)
    if traits.masks == ANYTHING:
        return _of(d, dv, MOST_COLUMNS, most, 1, 4, 64 if widest <= 64 else 32)
    if widest > 64 and (traits.dropout or traits.halved):
        return _of(d, dv, MOST_COLUMNS, most, 1, 8 if narrow else 4, 64 if narrow else 32)
    keys = 64 if widest <= 64 and not traits.halved else 48 if narrow else 32
    return _of(d, dv, MOST_COLUMNS, most, 2, 4, keys)


def _plan_decode(sizes: Sizes, traits: Traits, facts: DeviceFacts) -> tuple[KernelPlan, ...]:
    d, dv = round_up(sizes.head_dim, 16), round_up(sizes.v_head_dim, 16)
    most = 64 if traits.real == 8 else 256 if traits.tensor and traits.itemsize == 2 else 128
    wide = max(d, dv) * traits.itemsize > 256
    tiles = replace(_of(d, dv, MOST_COLUMNS, most, 1, 1, 32 if wide else 64), stages=2 if wide else 3)
    tiles = _tiles("attention_decode", tiles, sizes.rows, sizes.keys, traits, facts)
    heads = max(1, sizes.batch * sizes.kv_heads)
    wanted = -(-facts.multiprocessors * _DECODE_BLOCKS // heads)
    splits = max(1, min(wanted, sizes.keys // _SPLIT_KEYS))
    why = f"{sizes.rows} query rows a key head: memory decides, keys in {splits} parts"
    parts = tiles.dv // tiles.v_columns
    combine = KernelPlan(
        "attention_combine", "attention_decode", _plan("attention_decode", tiles, traits, 0, 1, "").defines,
        (heads * sizes.rows, 1), 128, 0, splits, why,
    )  # fmt: skip
    return replace(_plan("attention_decode", tiles, traits, heads * splits, parts, why), splits=splits), combine


def partial_size(sizes: Sizes, traits: Traits, splits: int) -> int:
    """Bytes of what the parts of a decode leave: an output, a maximum and a sum for every row."""
    return sizes.batch * sizes.kv_heads * splits * sizes.rows * (sizes.v_head_dim + 2) * traits.real


@lru_cache(_PLANS)
def plan_backward(sizes: Sizes, traits: Traits, facts: DeviceFacts) -> tuple[KernelPlan, ...]:
    """Gradients of query, key and value: one kernel for the keys' and the values', one for the queries'."""
    kernel, tiles, of_query = "attention_backward", _backward_tiles(sizes, traits), traits
    if facts.capability >= 100 and tiles.columns > 64:
        traits = _with_ranges(traits)
    tiles = _tiles(kernel, tiles, sizes.keys, sizes.queries, traits, facts)
    panels = -(-(sizes.keys - sizes.extra) // tiles.rows) + -(-sizes.extra // tiles.rows)
    heads = sizes.batch * sizes.kv_heads
    why = f"{heads * panels} blocks of {tiles.rows} keys, {tiles.keys} queries at a time"
    keys = _plan(kernel, tiles, traits, heads * panels, tiles.parts, why)
    return keys, _plan_backward_query(sizes, of_query, facts)


def _backward_tiles(sizes: Sizes, traits: Traits) -> Tiles:
    widest, narrow = max(sizes.head_dim, sizes.v_head_dim), traits.itemsize == 2
    more_kept = traits.masks == ANYTHING or traits.dropout
    most = 32 if traits.real == 8 else 64 if traits.halved else 128
    parts = -(-widest // most)
    columns, v_columns = (_columns(n, parts, traits) for n in (sizes.head_dim, sizes.v_head_dim))
    warps = 8 if narrow else 4
    if widest <= 64:
        queries = 64 if narrow and not more_kept else 16 if traits.real == 8 or traits.halved else 32
    else:
        queries = 32 if narrow and traits.masks != ANYTHING else 16
    return Tiles(1, warps, queries, parts * columns, parts * v_columns, columns, v_columns, stages=2)


def _plan_backward_query(sizes: Sizes, traits: Traits, facts: DeviceFacts) -> KernelPlan:
    kernel = "attention_backward_query"
    most = 64 if traits.real == 8 else 256 if traits.tensor and traits.itemsize == 2 else 128
    parts = -(-sizes.head_dim // most)
    columns, dv = _columns(sizes.head_dim, parts, traits), round_up(sizes.v_head_dim, 16)
    if traits.real == 8:
        row_tiles, warps, keys = 1, 4, 16
    elif columns <= 64 and traits.masks != ANYTHING and not traits.dropout:
        row_tiles, warps, keys = 2, 4, 32
    else:
        row_tiles, warps, keys = 1, 8 if traits.itemsize == 2 else 4, 16 if columns > 128 else 32
    tiles = Tiles(row_tiles, warps, keys, parts * columns, dv, columns, dv, stages=2)
    tiles = _tiles(kernel, tiles, sizes.rows, sizes.keys, traits, facts)
    blocks = sizes.batch * sizes.kv_heads * -(-sizes.rows // tiles.rows)
    why = f"{blocks} blocks of {tiles.rows} query rows, {tiles.keys} keys at a time"
    return _plan(kernel, tiles, traits, blocks, parts, why)


@lru_cache(_PLANS)
def plan_rows(kernel: str, sizes: Sizes, traits: Traits, facts: DeviceFacts) -> KernelPlan:
    """The row term of the backward."""
    rows = sizes.batch * sizes.heads * sizes.queries
    return KernelPlan(kernel, kernel, (("MHA_STORAGE", traits.storage), ("MHA_TENSOR", 0), ("MHA_WARPS", 4)),
                      (-(-rows // 4), 1), 128, 0, why=f"{rows} rows, a warp each")  # fmt: skip


@lru_cache(_PLANS)
def plan_weights(
    mode: int, target: tuple[int, int, int, int], sizes: Sizes, traits: Traits, facts: DeviceFacts
) -> KernelPlan:
    """The weights and their kin; `target` is the shape of what is written, or the problem's for sums over rows."""
    kernel = "attention_weights_gradient" if mode == MASK_GRADIENT else "attention_weights"
    if mode == ROW_SCALE:
        traits = traits._replace(dropout=False)
    d, dv = round_up(sizes.head_dim, 16), round_up(sizes.v_head_dim, 16)
    narrow_tile = traits.real == 8 or traits.masks == ANYTHING or mode == MASK_GRADIENT
    tiles = Tiles(1, 4, (16 if d > 128 else 32) if narrow_tile else 64, d, dv, d, dv)
    tiles = _tiles(kernel, tiles, sizes.queries, sizes.keys, traits, facts)
    batch, heads, rows, keys = target
    own = sizes.keys - sizes.extra
    if mode in (DELTA, ROW_SCALE):
        items = sizes.batch * sizes.heads * -(-sizes.queries // tiles.rows)
    else:
        panels = -(-own // tiles.keys) + -(-(keys - own) // tiles.keys)
        items = batch * heads * -(-rows // tiles.rows) * panels
    why = f"{items} parts of {tiles.rows} rows and {tiles.keys} keys"
    plan = _plan(kernel, tiles, traits, items, 1, why, MHA_MODE=mode)
    return replace(plan, kernel="attention_weights", stem="attention_weights")


def _columns(n: int, parts: int, traits: Traits) -> int:
    """Columns of one part: several begin at multiples of 128 bytes, where the order of a row's chunks repeats."""
    return round_up(n, 16) if parts == 1 else round_up(-(-n // parts), 128 // traits.itemsize)


def _of(d: int, dv: int, most: int, v_most: int, row_tiles: int, warps: int, keys: int) -> Tiles:
    """A tile whose columns are shared out evenly where they are more than a block takes on."""
    parts, v_parts = -(-d // most), -(-dv // v_most)
    d, dv = round_up(d, 16 * parts), round_up(dv, 16 * v_parts)
    return Tiles(row_tiles, warps, keys, d, dv, d // parts, dv // v_parts)


def _tiles(kernel: str, tiles: Tiles, rows: int, others: int, traits: Traits, facts: DeviceFacts) -> Tiles:
    return fitting(kernel, tiles, rows, others, traits, facts.shared_bytes)


def _plan(kernel: str, t: Tiles, traits: Traits, blocks: int, parts: int, why: str, **more: int) -> KernelPlan:
    if parts > 1:
        why += f", {parts} parts of the columns"
    names = {"MHA_COLUMNS": t.columns, "MHA_V_COLUMNS": t.v_columns, "MHA_STAGES": t.stages, **more}
    return KernelPlan(kernel, kernel, defines(kernel, t, traits, **names), (blocks, parts), 32 * t.warps,
                      SHARED[kernel](t, traits), why=why)  # fmt: skip


#: Features of a row up to which a warp works on it; more keep a whole block of threads busy.
_WARP_FEATURES = 1024
#: At most so many blocks of rows, each with its own sums; several per multiprocessor of any device.
_ROW_BLOCKS = 1024


@dataclass(frozen=True)
class RowsPlan:
    """How dropout, residual link and norm of rows run: kernels, one after the other."""

    kernels: tuple[KernelPlan, ...]
    #: Rows whose sums a team of threads makes, and how many such blocks there are.
    row_block: int = 0
    row_blocks: int = 0


def plan_residual_norm(rows: int, features: int, storage: int) -> RowsPlan:
    """Dropout, residual link and layer norm of (N * L, E); `storage` is a number of `params.STORAGE`."""
    return RowsPlan((_plan_rows("residual_norm", rows, features, storage),))


def plan_residual_norm_backward(rows: int, features: int, storage: int) -> RowsPlan:
    """Its backward; which rows are a block depends on their number alone, so that the bits are those of any device."""
    row_block = max(16, -(-rows // _ROW_BLOCKS))
    blocks = -(-rows // row_block)
    first = _plan_rows("residual_norm_backward", blocks, features, storage)
    last = replace(first, kernel="residual_norm_sums", grid=(-(-2 * features // 32), 1), why=f"{blocks} sums")
    return RowsPlan((first, last), row_block, blocks)


def _plan_rows(kernel: str, items: int, features: int, storage: int) -> KernelPlan:
    threads, team = (128, 32) if features <= _WARP_FEATURES else (256, 256)
    defines = (("MHA_STORAGE", storage), ("MHA_THREADS", threads), ("MHA_TEAM", team))
    why = f"{items} times {team} threads"
    # Shared memory: a number for each thread.
    return KernelPlan(kernel, "residual_norm", defines, (-(-items * team // threads), 1), threads, 8 * threads, why=why)
