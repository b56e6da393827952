"""How many threads a call uses. Read on every call, so that OMP_NUM_THREADS and threadpoolctl are obeyed."""

from __future__ import annotations

import math
import operator
import os
import threading
from functools import cache
from pathlib import Path

from mha.cpu import load

_wanted: int | None = None


def set_num_threads(n: int | None) -> None:
    """Use `n` threads from now on, more than there are cores if so asked; None returns to the default.

    A limit that threadpoolctl has set on the calling thread still holds.

    Raises
    ------
    ValueError
        If `n` is less than 1.
    TypeError
        If `n` is not an integer.
    """
    global _wanted
    if n is not None:
        n = operator.index(n)
        if n < 1:
            raise ValueError(f"{n} threads. Pass at least 1, or None for the default.")
    _wanted = n


def get_num_threads() -> int:
    """The number of threads the next call may use.

    By default what OpenMP would use on this thread, at most the processors this process may run on and its CPU quota.
    """
    limit = int(load.runtime().max_threads())
    if _wanted is None:
        return max(1, min(limit, usable_cpus()))
    # Anything but the start-up value was set on this thread since: a limit, or a parallel region around us.
    return min(_wanted, limit) if limit != default_limit() else _wanted


@cache
def default_limit() -> int:
    """What OpenMP would use if nobody had set a limit: what a thread sees that is new to it."""
    found: list[int] = []
    fresh = threading.Thread(target=lambda: found.append(int(load.runtime().max_threads())))
    fresh.start()
    fresh.join()
    return found[0]


def usable_cpus() -> int:
    """Processors that affinity and CPU quota leave to this process."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(count, _quota()))


@cache
def _quota() -> int:
    """Whole processors of the control group's CPU quota, rounded up; very many without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return 2**30 if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        pass
    try:
        folder = Path("/sys/fs/cgroup/cpu")
        quota, period = ((folder / name).read_text() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        return math.ceil(int(quota) / int(period)) if int(quota) > 0 else 2**30
    except (OSError, ValueError):
        return 2**30
