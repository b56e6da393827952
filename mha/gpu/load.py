"""One loaded kernel for each specialisation and device."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import mha
from mha.gpu.plan import KernelPlan
from mha.gpu.runtime import Runtime, Source


@cache
def folder() -> Path:
    """Where the CUDA sources lie: in the installed package, or beside it in a checkout."""
    try:
        return Path(str(resources.files("mha.cupy_kernels")))
    except ModuleNotFoundError:
        return Path(mha.__file__).parents[1] / "cupy_kernels"


@cache
def files(stem: str) -> tuple[tuple[str, str], ...]:
    """Name and text of a kernel's file and of every header."""
    headers = sorted(folder().glob("*.cuh"))
    return tuple((path.name, path.read_text()) for path in [*headers, folder() / f"{stem}.cu"])


def source(plan: KernelPlan) -> Source:
    """What is compiled for a plan."""
    return Source(plan.kernel, plan.stem, plan.defines, files(plan.stem))


_loaded: dict[Any, Any] = {}


def kernel(runtime: Runtime, plan: KernelPlan) -> Any:
    """The kernel of a plan for the current device, compiled and loaded at most once."""
    key = (runtime, runtime.device(), plan.kernel, plan.stem, plan.defines)
    found = _loaded.get(key)
    if found is None:
        found = _loaded[key] = runtime.load(source(plan), plan.shared)
    return found
