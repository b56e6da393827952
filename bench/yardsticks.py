"""The limits that figures are shares of, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

#: More than the caches of a large processor hold.
_READ_BYTES = 2**29


def fma_peak(threads: int) -> float:
    """GFLOP/s of float32 multiply-adds from register to register on all threads."""
    from mha.cpu import load

    kernel = load.kernels(load.chosen_level()).fma_rounds
    return threads * _best(lambda: int(kernel(2_000_000)))


def read_bandwidth(threads: int) -> float:
    """GB/s at which the threads together read memory."""
    from mha.cpu import load

    kernel = load.kernels(load.chosen_level()).read_all
    return _best(lambda: int(kernel(_much(), threads)))


@cache
def _much() -> NDArray[np.float32]:
    return np.ones(_READ_BYTES // 4, np.float32)


def _best(run: Callable[[], int], repeats: int = 7) -> float:
    """Billions of whatever `run` counts, a second."""
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        count = run()
        best = max(best, count / (time.perf_counter() - start) * 1e-9)
    return best
