"""The compiled kernels: one module per instruction-set level, the best one that the processor runs is loaded once.

The environment variable ``MHA_CPU_ISA`` forces a level.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import ModuleType

#: Best first.
LEVELS = ("amx", "avx512bf16", "avx512", "avx2", "baseline")

#: Rounds that an idle thread of the pool spins before it sleeps. Measured with a layer (1, 96, 256), 4 heads, on two
#: cores, microseconds alone / alternating with a NumPy product of 256 x 256: 0 rounds 590 / 594, 1000 rounds 525 / 817,
#: 10000 rounds 410 / 2900, libgomp's default up to twenty milliseconds.
_SPIN_COUNT = "1000"


@contextmanager
def _short_spin() -> Iterator[None]:
    """libgomp reads its waiting policy once, when it is loaded; the user's own choice stands."""
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


@cache
def runtime() -> ModuleType:
    """The module that talks to OpenMP, loaded with the spin set and the fork hook installed."""
    with _short_spin():
        module = importlib.import_module("mha.cpu._runtime")
    if hasattr(os, "register_at_fork"):
        # A child of a process whose pool has run would hang in its first region.
        os.register_at_fork(before=module.release_pool)
    return module


@cache
def built_levels() -> tuple[str, ...]:
    """The levels this installation has, best first."""
    return tuple(level for level in LEVELS if find_spec(f"mha.cpu._kernels_{level}") is not None)


@cache
def runnable_levels() -> tuple[str, ...]:
    """The built levels that this processor and operating system run, best first."""
    return tuple(level for level in built_levels() if runtime().runs(level))


def chosen_level() -> str:
    """The level in use: the best runnable one, or the one that ``MHA_CPU_ISA`` names.

    Raises
    ------
    RuntimeError
        If ``MHA_CPU_ISA`` names a level that is unknown, not built or not runnable here.
    """
    forced = os.environ.get("MHA_CPU_ISA")
    if not forced:
        return runnable_levels()[0]
    if forced not in runnable_levels():
        raise RuntimeError(
            f"MHA_CPU_ISA={forced!r}, but built are {', '.join(built_levels())} and this machine runs "
            f"{', '.join(runnable_levels())}. Choose one of the latter, or unset the variable."
        )
    return forced


@cache
def kernels(level: str) -> ModuleType:
    """The kernels of a level."""
    runtime()
    return importlib.import_module(f"mha.cpu._kernels_{level}")
