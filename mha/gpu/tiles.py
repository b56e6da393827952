"""Tiles of the GPU kernels: what a block of threads works on, what it takes of shared memory, what is compiled in.

The byte counts are those of the layouts at the top of each .cu file, which refuses to compile with another number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

#: Numbers of MHA_MASKS in cupy_kernels/mask.cuh.
NOTHING_HIDDEN, RANGES, ANYTHING = range(3)


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
    #: Whether rows of every input can be copied 16 bytes at a time.
    aligned: bool

    @property
    def halved(self) -> bool:
        """float32 in two tf32 parts, which take twice the registers of an operand."""
        return self.tensor and self.itemsize == 4


@dataclass(frozen=True)
class Tiles:
    """`warps` times 16 * `row_tiles` rows, against `keys` of the other side at a time."""

    row_tiles: int
    warps: int
    keys: int
    #: Head sizes as compiled, and how many of their columns a block sums up.
    d: int
    dv: int
    columns: int
    v_columns: int
    #: Tiles of the other side in shared memory at a time: one more than are being used.
    stages: int = 1

    @property
    def rows(self) -> int:
        """Of a block."""
        return 16 * self.row_tiles * self.warps

    @property
    def parts(self) -> int:
        """Blocks that share the columns of a result."""
        return max(self.d // self.columns, self.dv // self.v_columns)


def round_up(n: int, step: int) -> int:
    """To a multiple, at least one."""
    return max(1, -(-n // step)) * step


def row_bytes(columns: int, itemsize: int) -> int:
    """Of a row in shared memory: `Tile` in cupy_kernels/tile.cuh."""
    chunks = -(-columns * itemsize // 16)
    if chunks > 4:
        return 16 * round_up(chunks, 8)
    return 16 * (chunks if chunks <= 2 else 4)


def _panel(rows: int) -> int:
    """Of `Panel` in cupy_kernels/mask.cuh."""
    return round_up(4 * (4 * rows + 4), 16)


def _both(t: Tiles, traits: Traits) -> int:
    """A row of queries or keys and one of values or gradients."""
    return row_bytes(t.d, traits.itemsize) + row_bytes(t.dv, traits.itemsize)


def _spare(t: Tiles, traits: Traits) -> int:
    return 0 if traits.tensor else t.rows * row_bytes(t.keys, traits.real)


def _draws(t: Tiles, traits: Traits) -> int:
    return t.rows * (t.keys // 8 + 1) if traits.dropout else 0


def _forward(t: Tiles, traits: Traits) -> int:
    queries, values = row_bytes(t.d, traits.itemsize), row_bytes(t.v_columns, traits.itemsize)
    kept = _panel(t.rows) + t.rows * queries + t.keys * (queries + values)
    return kept + _spare(t, traits) + _draws(t, traits)


def _decode(t: Tiles, traits: Traits) -> int:
    queries, values = row_bytes(t.d, traits.itemsize), row_bytes(t.v_columns, traits.itemsize)
    kept = _panel(t.rows) + t.rows * queries + t.stages * t.keys * (queries + values)
    return kept + _spare(t, traits) + _draws(t, traits)


def _backward_query(t: Tiles, traits: Traits) -> int:
    kept = _panel(t.rows) + (t.rows + t.stages * t.keys) * _both(t, traits)
    return kept + _spare(t, traits) + _draws(t, traits)


def _backward(t: Tiles, traits: Traits) -> int:
    panel = round_up(t.keys * (8 + 3 * traits.real) + 8, 16)  # KeyPanel in cupy_kernels/key_panel.cuh
    kept = t.rows * _both(t, traits) + t.stages * (panel + t.keys * _both(t, traits))
    draws = t.warps * t.keys * (2 * t.row_tiles + 1) if traits.dropout else 0
    return kept + _spare(t, traits) + draws


def _weights(t: Tiles, traits: Traits) -> int:
    return _panel(t.rows) + (t.rows + t.keys) * row_bytes(t.d, traits.itemsize) + _draws(t, traits)


def _weights_gradient(t: Tiles, traits: Traits) -> int:
    sums = t.warps * t.keys * traits.real
    return _panel(t.rows) + (t.rows + t.keys) * _both(t, traits) + sums + _draws(t, traits)


#: Kernel -> bytes of shared memory.
SHARED: dict[str, Callable[[Tiles, Traits], int]] = {
    "attention_forward": _forward,
    "attention_decode": _decode,
    "attention_backward_query": _backward_query,
    "attention_backward": _backward,
    "attention_weights": _weights,
    "attention_weights_gradient": _weights_gradient,
}


def fitting(kernel: str, tiles: Tiles, rows: int, others: int, traits: Traits, shared_bytes: int) -> Tiles:
    """The tile, smaller where the problem has fewer rows or keys, or the device less shared memory."""
    for smaller in _smaller(tiles, rows, others, traits.tensor):
        if SHARED[kernel](smaller, traits) <= shared_bytes:
            return smaller
    raise AssertionError(f"no tile of {kernel} for {traits} fits into {shared_bytes} bytes, of {tiles}")


def _smaller(tiles: Tiles, rows: int, others: int, tensor: bool) -> Iterator[Tiles]:
    """From `tiles` on: what the problem leaves of it, then what costs least first; matrix instructions take 16 keys."""
    t = tiles
    while t.warps > 1 and rows <= 16 * t.row_tiles * (t.warps // 2):
        t = replace(t, warps=t.warps // 2)
    if t.row_tiles == 2 and rows <= 16 * t.warps:
        t = replace(t, row_tiles=1)
    while t.keys > 16 and others <= _fewer(t.keys):
        t = replace(t, keys=_fewer(t.keys))
    while True:
        yield t
        if t.keys > 32:
            t = replace(t, keys=_fewer(t.keys))
        elif t.stages > 1:
            t = replace(t, stages=t.stages - 1)
        elif t.warps > 1:
            t = replace(t, warps=t.warps // 2)
        elif t.row_tiles > 1:
            t = replace(t, row_tiles=1)
        elif t.keys > (16 if tensor else 8):
            t = replace(t, keys=_fewer(t.keys))
        else:
            return


def _fewer(keys: int) -> int:
    """The next smaller power of two."""
    return 1 << ((keys - 1).bit_length() - 1)


def defines(kernel: str, t: Tiles, traits: Traits, **more: int) -> tuple[tuple[str, int], ...]:
    """The macros of a specialisation."""
    found = {
        "MHA_STORAGE": traits.storage,
        "MHA_TENSOR": int(traits.tensor),
        "MHA_MASKS": traits.masks,
        "MHA_DROPOUT": int(traits.dropout),
        "MHA_ALIGNED": int(traits.aligned),
        "MHA_HEAD_DIM": t.d,
        "MHA_V_HEAD_DIM": t.dv,
        "MHA_KEYS": t.keys,
        "MHA_ROW_TILES": t.row_tiles,
        "MHA_WARPS": t.warps,
        "MHA_SHARED": SHARED[kernel](t, traits),
        **more,
    }
    return tuple(found.items())
