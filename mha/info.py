"""What is installed, built and chosen, and what a call would run: `show_config`, ``python -m mha info``, `explain`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha import core, optional
from mha.cpu import describe as cpu
from mha.cpu import load, threads
from mha.dispatch import backend_for
from mha.exchange import in_kind
from mha.explanation import Explanation
from mha.gpu import describe as gpu
from mha.mask_checks import Window

Array = NDArray[Any]

_PACKAGES = ("ml_dtypes", "threadpoolctl", "matplotlib")
_WORDS = {True: "yes", False: "no"}


def config() -> dict[str, Any]:
    """Versions, backends and their kernels, instruction sets and threads, as plain values.

    Never raises: where something cannot be found out, the reason stands in its place.
    """
    of_gpu = gpu.config()
    return {
        "mha": _version("mha"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "optional": {name: _version(name) for name in _PACKAGES} | {"cupy": of_gpu["cupy"]},
        "machine": platform.machine(),
        "backend forced by MHA_BACKEND": os.environ.get("MHA_BACKEND") or "none",
        "instruction sets": {
            "built": _or_reason(lambda: list(load.built_levels())),
            "runnable": _or_reason(lambda: list(load.runnable_levels())),
            "chosen": _or_reason(load.chosen_level),
        },
        "openmp": _or_reason(lambda: load.runtime().OPENMP or "none: serial build, compiled without OpenMP"),
        "threads": {"used": _or_reason(threads.get_num_threads), "processors": _or_reason(threads.usable_cpus)},
        "thread pools": _or_reason(
            lambda: [
                {key: pool.get(key) for key in ("user_api", "internal_api", "num_threads", "version")}
                for pool in optional.threadpool_info()
            ]
        ),
        "cpu kernels": _or_reason(lambda: cpu.config()["kernels"]),
        "gpu": {name: value for name, value in of_gpu.items() if name != "kernels" and value is not None},
        "gpu kernels": of_gpu["kernels"],
    }


def _or_reason(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # a broken installation, a variable that names what is not there
        return f"{type(error).__name__}: {error}"


def show_config(as_json: bool = False) -> None:
    """Print `config` as text, or as JSON."""
    found = config()
    print(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


@in_kind
def explain(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window = None,
    softcap: float | None = None,
    causal_offset: Any = 0,
    key_lengths: Any = None,
    query_lengths: Any = None,
    dropout_state: tuple[int, int] | None = None,
    return_lse: bool = False,
) -> Explanation:
    """What `scaled_dot_product_attention` would run with these arguments, and its backward; nothing is run.

    Parameters
    ----------
    query, key, value, ... :
        As in `scaled_dot_product_attention`; no dropout state is drawn.

    Returns
    -------
    Explanation
        Backend, and for forward and backward the kernels with their tiles, splits, threads or grid, memory and the
        reason for each; prints as text, `as_dict` gives plain values.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `scaled_dot_product_attention`.
    """
    state = dropout_state or ((0, 0) if dropout_p > 0 else None)
    problem = core._problem(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap,
                            causal_offset, key_lengths, query_lengths, state)  # fmt: skip
    forced = os.environ.get("MHA_BACKEND")
    why = f"MHA_BACKEND is {forced}" if forced else f"the arrays are {problem.xp.__name__}'s"
    explanation: Explanation = backend_for(problem).explain(problem)
    return replace(explanation, why=why)


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, entry in value.items():
        if name.endswith(" kernels") and isinstance(entry, dict):
            lines += [f"{indent}{name}:", *_kernel_lines(entry, indent + "  ")]
        elif isinstance(entry, dict):
            lines += [f"{indent}{name}:", *_lines(entry, indent + "  ")]
        elif isinstance(entry, list):
            items = [", ".join(f"{k} {v}" for k, v in x.items()) if isinstance(x, dict) else str(x) for x in entry]
            lines.append(f"{indent}{name}: {'; '.join(items) or 'none'}")
        else:
            lines.append(f"{indent}{name}: {'not installed' if entry is None else entry}")
    return lines


def _kernel_lines(kernels: dict[str, Any], indent: str) -> list[str]:
    """A line for each; a reason that is the one before is not repeated."""
    lines, last = [], None
    for kernel, entry in kernels.items():
        facts = {name: x for name, x in entry.items() if name != "why not"}
        text = ", ".join(f"{name} {_WORDS[x] if isinstance(x, bool) else _joined(x)}" for name, x in facts.items())
        why = entry["why not"]
        reason = "; ".join(f"not {n}: {x}" for n, x in why.items()) if isinstance(why, dict) else why
        lines.append(f"{indent}{kernel}: {text}" + (f" ({'as above' if reason == last else reason})" if reason else ""))
        last = reason
    return lines


def _joined(x: Any) -> Any:
    return " ".join(x) if isinstance(x, list) else x


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
