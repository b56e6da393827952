"""From the computing type to the stored one: to the nearest, ties to even, at every level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from shared import taken
from tolerance import DTYPES

import mha
from mha import cpu
from mha.matrix import rows_of
from mha.problem import COMPUTING

HALVES = [name for name in DTYPES if COMPUTING[np.dtype(DTYPES[name])] != np.dtype(DTYPES[name])]


def stored(x: Any, dtype: Any) -> Any:
    """float32 values as the kernels store them: a product with 1 whose result is of another type."""
    out = np.empty((x.size, 1), dtype)
    cpu.product(rows_of(x.reshape(-1, 1)), rows_of(np.ones((1, 1), np.float32)), rows_of(out))
    return out[:, 0]


def same_bits(found: Any, right: Any) -> None:
    """Except for the sign of a zero."""
    nonzero = right.view(np.uint16) & 0x7FFF != 0
    np.testing.assert_array_equal(found.view(np.uint16)[nonzero], right.view(np.uint16)[nonzero])
    assert (found.view(np.uint16)[~nonzero] & 0x7FFF == 0).all()


def between_neighbours(dtype: Any) -> Any:
    """Every finite positive value, the midpoint to the next one, and the float32 neighbours of that."""
    patterns = np.arange(2**15, dtype=np.uint16).view(dtype).astype(np.float32)
    values = patterns[np.isfinite(patterns)]
    middle = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
    last = values[-1].astype(np.float64)
    limit = np.float32(min(last + (last - values[-2]) / 2, np.finfo(np.float32).max))
    x = np.concatenate([values, middle, np.float32([limit, np.inf])])
    with np.errstate(over="ignore"):
        around = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])
    return np.concatenate([around, -around])


@pytest.mark.parametrize("dtype", HALVES)
def test_every_tie_and_its_neighbours(dtype: str, level: str) -> None:
    kind = DTYPES[dtype]
    x = between_neighbours(kind)
    with np.errstate(over="ignore"):
        right = x.astype(kind)
    same_bits(stored(x, kind), right)


@pytest.mark.parametrize("dtype", HALVES)
def test_any_bits(dtype: str, level: str) -> None:
    kind = DTYPES[dtype]
    x = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    found = stored(x, kind)
    with np.errstate(over="ignore", invalid="ignore"):
        right = x.astype(kind)
    nan = np.isnan(x)
    assert np.isnan(found[nan].astype(np.float32)).all()
    same_bits(found[~nan], right[~nan])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("queries", [20, 2], ids=["forward", "decode"])
def test_the_attention_kernels_read_and_store_alike(dtype: str, queries: int, level: str) -> None:
    """One visible key: its value passes through unchanged, subnormals and infinities included."""
    kind = DTYPES[dtype]
    patterns = np.arange(2**16, dtype=np.uint16).view(kind)
    value = patterns[~np.isnan(patterns.astype(np.float32))].reshape(1, 1, 1, -1)[..., :4096]
    query = np.ones((1, 1, queries, 1), kind)
    for part in (value, -value):
        output = mha.scaled_dot_product_attention(query, query[:, :, :1], part)
        right = taken(part, level) if queries > 8 else part  # decoding takes no pairs
        np.testing.assert_array_equal(output, np.broadcast_to(right, output.shape))
