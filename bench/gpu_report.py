"""Measurements of the GPU bench -> the figures of a row, the table, the JSON file."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

from bench.gpu_cases import Row, goals

RESULTS = Path(__file__).parent / "results"


def figures(row: Row, times: dict[str, float], refused: dict[str, str], copy_rate: float) -> dict[str, Any]:
    """What is stated of a row; `times` are seconds by library, ours is "mha"; `copy_rate` bytes/s read and written."""
    rates = {name: row.flops / seconds / 1e12 for name, seconds in times.items()}
    measures: dict[str, float | None] = {"TFLOP/s": rates.get("mha")}
    for name in ("FLASH", "CUDNN", "EFFICIENT", "MATH"):
        both = "mha" in times and name in times
        measures[f"share of {name}"] = times[name] / times["mha"] if both else None
    measures["times MATH"] = measures["share of MATH"]
    if row.kind == "decode" and "mha" in times:
        measures["share of copy"] = row.read_bytes / times["mha"] / copy_rate
    return {
        "row": row.name,
        "flops": row.flops,
        "seconds": times,
        "tflops": rates,
        "refused": refused,
        "measures": {name: value for name, value in measures.items() if value is not None},
        "goals": [{"goal": str(g), "found": measures.get(g.measure), "met": g.met(measures.get(g.measure))}
                  for g in goals(row)],
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """One line a row: rates of everyone, and how the goals stand."""
    names = ["mha", "FLASH", "CUDNN", "EFFICIENT", "MATH"]
    lines = [f"{'TFLOP/s':48}" + "".join(f"{name:>11}" for name in names) + "  goals"]
    for one in found:
        cells = "".join(f"{one['tflops'][name]:11.1f}" if name in one["tflops"] else f"{'-':>11}" for name in names)
        lines.append(f"{one['row']:48}{cells}  {'; '.join(map(_goal, one['goals']))}".rstrip())
    return "\n".join(lines)


def _goal(one: dict[str, Any]) -> str:
    if one["found"] is None:
        return f"{one['goal']}: not measured"
    return f"{one['goal']}: {one['found']:.2f} {'met' if one['met'] else 'MISSED'}"


def versions() -> dict[str, Any]:
    """Of everything that has a part in the figures."""
    import cupy
    import numpy as np
    import torch

    import mha

    root = Path(__file__).parents[1]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "date": date.today().isoformat(), "commit": commit, "mha": mha.__version__, "python": platform.python_version(),
        "numpy": np.__version__, "cupy": cupy.__version__, "torch": torch.__version__,
        "cuda driver": cupy.cuda.runtime.driverGetVersion(), "cuda": cupy.cuda.runtime.runtimeGetVersion(),
        "gpu": properties["name"].decode(), "multiprocessors": properties["multiProcessorCount"],
    }  # fmt: skip


def write(machine: dict[str, Any], ceilings: dict[str, float], host: dict[str, float], rows: list[dict[str, Any]],
          folder: Path = RESULTS) -> Path:  # fmt: skip
    """The JSON file with everything."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in machine["gpu"].lower())
    path = folder / f"gpu-{name}-{machine['date']}.json"
    path.write_text(json.dumps({"machine": machine, "ceilings": ceilings, "host": host, "rows": rows}, indent=1) + "\n")
    return path
