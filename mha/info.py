"""What is installed, built and chosen: `show_config` and ``python -m mha info``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Any

import numpy as np

from mha import optional
from mha.cpu import load, threads

_PACKAGES = ("ml_dtypes", "threadpoolctl", "matplotlib", "cupy")


def config() -> dict[str, Any]:
    """Versions, instruction sets and threads, as plain values."""
    runtime = load.runtime()
    return {
        "mha": _version("mha"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "optional": {name: _version(name) for name in _PACKAGES},
        "machine": platform.machine(),
        "instruction sets": {
            "built": list(load.built_levels()),
            "runnable": list(load.runnable_levels()),
            "chosen": load.chosen_level(),
        },
        "openmp": runtime.OPENMP or "none: serial build, compiled without OpenMP",
        "threads": {"used": threads.get_num_threads(), "processors": threads.usable_cpus()},
        "thread pools": [
            {key: pool.get(key) for key in ("user_api", "internal_api", "num_threads", "version")}
            for pool in optional.threadpool_info()
        ],
    }


def show_config(as_json: bool = False) -> None:
    """Print `config` as text, or as JSON."""
    found = config()
    print(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, entry in value.items():
        if isinstance(entry, dict):
            lines += [f"{indent}{name}:", *_lines(entry, indent + "  ")]
        elif isinstance(entry, list):
            items = [", ".join(f"{k} {v}" for k, v in x.items()) if isinstance(x, dict) else str(x) for x in entry]
            lines.append(f"{indent}{name}: {'; '.join(items) or 'none'}")
        else:
            lines.append(f"{indent}{name}: {'not installed' if entry is None else entry}")
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
