"""Every choice of the GPU backend, as pure functions of sizes, types and the device: which kernel, tiles, memory.

A tile is compiled in, so every plan is one specialisation. Sizes are rounded up to few values: D and Dv to multiples of
16, row blocks and key tiles to powers of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mha.gpu.runtime import DeviceFacts
from mha.problem import Sizes

#: Numbers of MHA_MASKS in cupy_kernels/mask.cuh.
NOTHING_HIDDEN, RANGES, ANYTHING = range(3)

#: The largest head size.
MOST_COLUMNS = 256


class Traits(NamedTuple):
    """What a specialisation depends on besides sizes."""

    #: A number of `params.STORAGE`.
    storage: int
    itemsize: int
    #: Bytes of the computing type.
    real: int
    #: Matrix instructions; without them plain multiplications and additions, which float32 is exact with.
    tensor: bool
    masks: int
    dropout: bool
    #: Whether rows of query, key and value can be copied 16 bytes at a time.
    aligned: bool


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


@dataclass(frozen=True)
class Tiles:
    """What a block of threads works on: `warps` times 16 * `row_tiles` rows, against `keys` columns at a time."""

    row_tiles: int
    warps: int
    keys: int
    #: Columns of the output that a block takes on.
    columns: int

    @property
    def rows(self) -> int:
        """Of a block."""
        return 16 * self.row_tiles * self.warps


def row_bytes(columns: int, itemsize: int) -> int:
    """Of a row in shared memory, as `Tile` in cupy_kernels/tile.cuh lays it out."""
    chunks = -(-columns * itemsize // 16)
    if chunks > 4:
        return 16 * round_up(chunks, 8)
    return 16 * (chunks if chunks <= 2 else 4)


def round_up(n: int, step: int) -> int:
    """To a multiple, at least one."""
    return max(1, -(-n // step)) * step


def _panel_bytes(rows: int) -> int:
    """Of `Panel` in cupy_kernels/mask.cuh."""
    return round_up(4 * (4 * rows + 4), 16)


def _forward_bytes(tiles: Tiles, d: int, traits: Traits) -> int:
    """Shared memory of attention_forward: panel, queries, keys, values, and what the weights need."""
    queries = row_bytes(d, traits.itemsize)
    spare = 0 if traits.tensor else tiles.rows * row_bytes(tiles.keys, traits.real)
    draws = tiles.rows * (tiles.keys // 8 + 1) if traits.dropout else 0
    values = row_bytes(tiles.columns, traits.itemsize)
    return _panel_bytes(tiles.rows) + tiles.rows * queries + tiles.keys * (queries + values) + spare + draws


def plan_forward(sizes: Sizes, traits: Traits, facts: DeviceFacts) -> KernelPlan:
    """Output and log-sum-exp."""
    d, dv = round_up(sizes.head_dim, 16), round_up(sizes.v_head_dim, 16)
    tiles = _first_that_fits(
        _forward_tiles(max(d, dv), dv, traits), sizes.rows, sizes.keys, facts, lambda t: _forward_bytes(t, d, traits)
    )
    blocks = sizes.batch * sizes.kv_heads * -(-sizes.rows // tiles.rows)
    parts = -(-dv // tiles.columns)
    return KernelPlan(
        "attention_forward", "attention_forward", _defines(tiles, d, traits, _forward_bytes(tiles, d, traits)),
        (blocks, parts), 32 * tiles.warps, _forward_bytes(tiles, d, traits),
        why=f"{blocks} blocks of {tiles.rows} query rows, {tiles.keys} keys at a time"
        + (f", {parts} parts of the output's columns" if parts > 1 else ""),
    )  # fmt: skip


def _forward_tiles(widest: int, dv: int, traits: Traits) -> Tiles:
    """The tile for large problems.

    The registers decide: the output takes row_tiles * columns / 2 of a thread's 255, the scores row_tiles * keys / 2,
    twice as many in float64. Two row tiles halve the shared memory that the products read.
    """
    if traits.real == 8:
        return Tiles(1, 4, 32 if widest <= 64 else 16, min(dv, 64 if traits.dropout and widest > 64 else 128))
    if widest > 128:
        return Tiles(1, 8 if traits.itemsize == 2 else 4, 32, min(dv, 256 if traits.tensor else 128))
    if traits.masks == ANYTHING:
        return Tiles(1, 4, 64 if widest <= 64 else 32, dv)
    if traits.dropout and widest > 64:
        return Tiles(1, 8 if traits.itemsize == 2 else 4, 64 if traits.itemsize == 2 else 32, dv)
    return Tiles(2, 4, 64 if widest <= 64 or traits.itemsize == 2 else 32, dv)


def _first_that_fits(tiles: Tiles, rows: int, keys: int, facts: DeviceFacts, size: object) -> Tiles:
    """The tile, smaller where the problem has fewer rows or keys, or the device less shared memory."""
    for smaller in _smaller(tiles, rows, keys):
        if size(smaller) <= facts.shared_bytes:  # type: ignore[operator]
            return smaller
    raise AssertionError(f"no tile fits into {facts.shared_bytes} bytes")


def _smaller(tiles: Tiles, rows: int, keys: int) -> Iterator[Tiles]:
    row_tiles, warps, block = tiles.row_tiles, tiles.warps, tiles.keys
    while warps > 1 and rows <= 16 * row_tiles * (warps // 2):
        warps //= 2
    if row_tiles == 2 and rows <= 16 * warps:
        row_tiles = 1
    while block > 16 and keys <= block // 2:
        block //= 2
    while True:
        yield Tiles(row_tiles, warps, block, tiles.columns)
        if block > 32:
            block //= 2
        elif warps > 1:
            warps //= 2
        elif row_tiles > 1:
            row_tiles = 1
        elif block > 16:
            block = 16
        else:
            return


def _defines(tiles: Tiles, d: int, traits: Traits, shared: int) -> tuple[tuple[str, int], ...]:
    return (
        ("MHA_STORAGE", traits.storage),
        ("MHA_TENSOR", int(traits.tensor)),
        ("MHA_MASKS", traits.masks),
        ("MHA_DROPOUT", int(traits.dropout)),
        ("MHA_ALIGNED", int(traits.aligned)),
        ("MHA_HEAD_DIM", d),
        ("MHA_V_HEAD_DIM", tiles.columns),
        ("MHA_ROW_TILES", tiles.row_tiles),
        ("MHA_WARPS", tiles.warps),
        ("MHA_KEYS", tiles.keys),
        ("MHA_SHARED", shared),
    )
