"""What the GPU backend has and would do, without doing it: for `show_config` and `explain`."""

from __future__ import annotations

import importlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from mha.explanation import Explanation, KernelUse, Pass, described
from mha.gpu import compile, launch, load, runtime
from mha.gpu.plan import ROW_SCALE, KernelPlan, partial_size, plan_backward, plan_forward, plan_rows, plan_weights
from mha.problem import AttentionProblem

_ENTRY = re.compile(r"^KERNEL\([^)]*\)\s*(\w+)\(", re.MULTILINE)


def check(library: ModuleType) -> None:
    """Raise RuntimeError if arrays of the library cannot be made or computed on here."""
    runtime.of(library).facts()


def config() -> dict[str, Any]:
    """Sources, CuPy, compiler, driver, device and cache; every kernel, and why it cannot run. Never raises."""
    sources, compiled, cache = _found(_entries), _found(_compiled), _found(compile.cache_folder)
    cupy = _found(lambda: importlib.import_module("cupy").__version__)
    nvrtc = _found(lambda: ".".join(map(str, compile.compiler().getVersion())))
    driver = _found(lambda: runtime.cupy().driver())
    device, usable = _found(lambda: runtime.cupy().found()), _found(lambda: runtime.cupy().facts())
    facts = device.value
    absent = "CuPy is not installed" if isinstance(cupy.error, ModuleNotFoundError) else cupy.why_not
    why_not = absent or usable.why_not or nvrtc.why_not
    forced = os.environ.get("MHA_BACKEND") or "gpu"
    not_chosen = why_not or (None if forced == "gpu" else f"MHA_BACKEND is {forced}")
    return {
        "sources": _found(load.folder).shown,
        "cupy": absent.removeprefix("CuPy is ") if absent else cupy.value,
        "nvrtc": absent or nvrtc.shown,
        "driver": f"for CUDA {runtime.cuda_version(driver.value)}" if driver.value else "none found",
        "device": absent or device.why_not or facts.name,
        "compute capability": None if facts is None else facts.capability / 10,
        "multiprocessors": None if facts is None else facts.multiprocessors,
        "cache": cache.shown,
        "compiled kernels": sum((compiled.value or {}).values()),
        "kernels": {
            name: {
                "source": source,
                "compiled": (compiled.value or {}).get(name, 0),
                "runnable": why_not is None,
                "chosen": not_chosen is None,
                "why not": not_chosen,
            }
            for name, source in (sources.value or {}).items()
        },
    }


class _Found(NamedTuple):
    """What was asked for, or why there is none."""

    value: Any
    error: Exception | None = None

    @property
    def why_not(self) -> str | None:
        """The reason; None if there is a value."""
        return None if self.error is None else compile.first_line(self.error)

    @property
    def shown(self) -> str:
        """Either of them."""
        return self.why_not or str(self.value)


def _found(function: Callable[[], Any]) -> _Found:
    try:
        return _Found(function())
    except Exception as error:  # whatever is missing, and however it says so
        return _Found(None, error)


def _entries() -> dict[str, str]:
    """Kernel -> the file that it is in."""
    files = sorted(load.folder().glob("*.cu"))
    return {name: path.name for path in files for name in _ENTRY.findall(path.read_text())}


def _compiled() -> Counter[str]:
    """Kernel -> how many specialisations of it the cache holds."""
    return Counter(path.stem.rpartition("_")[0] for path in compile.cache_folder().glob("*.cubin"))


def explain(problem: AttentionProblem) -> Explanation:
    """The kernels that would run, from the plans that `attention_forward` and `attention_backward` follow."""
    p, device = problem, runtime.of(problem.xp)
    facts, traits, sizes = device.facts(), launch.traits(problem, device), problem.sizes
    row_bytes = p.batch * p.heads * p.queries * p.computing.itemsize
    forward = list(plan_forward(sizes, traits, facts)) if row_bytes else []
    partials = partial_size(sizes, traits, forward[0].splits) if len(forward) > 1 else 0
    backward: list[KernelPlan] = []
    if row_bytes * p.keys:
        # As for a gradient of the output that lies as the output does: aligned if the value's rows are.
        target = p.batch, p.heads, p.queries, p.keys
        backward.append(plan_weights(ROW_SCALE, target, sizes, traits, facts))
        backward.append(plan_rows("attention_delta", sizes, traits, facts))
        backward += plan_backward(sizes, traits, facts)
    size = p.dtype.itemsize * p.batch
    name = f"{facts.name}, compute capability {facts.capability / 10}, {facts.multiprocessors} multiprocessors"
    return Explanation(
        "gpu", name, described(p),
        Pass(tuple(map(_use, forward)), size * p.heads * p.queries * p.v_head_dim + row_bytes,
             2 * row_bytes + partials),
        Pass(tuple(map(_use, backward)), size * sum(math.prod(x.shape[-3:]) for x in (p.query, p.key, p.value)),
             2 * row_bytes if backward else 0),
    )  # fmt: skip


def _use(plan: KernelPlan) -> KernelUse:
    tiles = tuple((name.removeprefix("MHA_").lower(), value) for name, value in plan.defines)
    return KernelUse(plan.kernel, plan.why, plan.threads, plan.shared, tiles, plan.grid, plan.splits)
