"""The keep masks of MegEngine's CPU generator, which its recorded dropout cases were made with.

splitmix64 seeds xoroshiro128+ (55, 14, 36); each draw is a float32 in (0, 1], and a value is dropped if its draw is
below p. One stream serves a call: the attention weights first, then the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

_MASK = 2**64 - 1


def draws(seed: int) -> Iterator[np.float32]:
    """The uniform draws of one call."""
    state = seed & _MASK

    def splitmix() -> int:
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
        return z ^ (z >> 31)

    a, b = splitmix(), splitmix()
    while True:
        word = (a + b) & _MASK
        b ^= a
        a = _rotated(a, 55) ^ b ^ (b << 14 & _MASK)
        b = _rotated(b, 36)
        yield np.float32(1) - np.float32(word >> 41) * np.float32(2.0**-23)


def keep_mask(stream: Iterator[np.float32], p: float, shape: tuple[int, ...]) -> Any:
    """True where a value is kept; the draws are spent even for p = 0."""
    return np.array([next(stream) >= np.float32(p) for _ in range(math.prod(shape))], bool).reshape(shape)


def _rotated(x: int, bits: int) -> int:
    return (x << bits | x >> (64 - bits)) & _MASK
