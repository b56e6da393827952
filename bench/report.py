"""Rows of the table, the goals, and the file of results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

COLUMNS = ("case", "us", "GFLOP/s", "of peak", "of SGEMM", "extra MB", "error")
RESULTS = Path(__file__).parent / "results"
#: Of the environment, those that choose instruction sets: ours, torch's, MKL's and OpenBLAS's.
_SETTINGS = ("MHA_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE")


def row_of(result: dict[str, Any], limits: dict[str, float]) -> list[str]:
    """Our figures; `ratios` are the cells that follow."""
    ours = result["libraries"].get("mha")
    if ours is None:
        return [result["job"], *[""] * (len(COLUMNS) - 1)]
    extra, peak, sgemm = ours["extra_bytes"], limits.get("peak"), limits.get("sgemm")
    return [
        result["job"],
        f"{ours['best'] * 1e6:.0f}",
        f"{ours['gflops']:.1f}",
        f"{ours['gflops'] / peak:.0%}" if peak else "",
        f"{ours['gflops'] / sgemm:.0%}" if sgemm else "",
        "" if extra is None else f"{extra / 2**20:.1f}",
        f"{ours['rms']:.0e}",
    ]


def ratios(result: dict[str, Any], rivals: list[str]) -> list[str]:
    """Rival's best time over ours; for the row beside a layer, NumPy's median there over its median alone."""
    ours = result["libraries"].get("mha")
    cells = []
    for name in rivals:
        rival = result["libraries"].get(name)
        if ours is None or rival is None:
            cells.append("-")
        elif result["kind"] == "beside":
            cells.append(f"{ours['median'] / rival['median']:.2f}x slower")
        else:
            cells.append(f"{rival['best'] / ours['best']:.2f}")
    return cells


def table(rows: list[list[str]], header: list[str]) -> str:
    """Aligned text: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def goal_table(found: list[dict[str, Any]]) -> str:
    """One line a goal: what the figures come to, the worst of them, and how the goal stands."""
    rows = []
    for one in found:
        if one["mean"] is None:
            rows.append([one["what"], "-", "-", one["goal"], "not measured"])
            continue
        verdict = {True: "met", False: "MISSED", None: ""}[one["met"]]
        worst = f"{one['figures'][one['worst']]:.2f} ({one['worst']})"
        rows.append([one["what"], f"{one['mean']:.2f}", worst, one["goal"], verdict])
    return table(rows, ["goal", "mean", "worst", "wanted", ""])


def machine(threads: int, libraries: list[str]) -> dict[str, Any]:
    """Of everything that has a part in the figures."""
    import mha
    from mha.cpu import load

    root = Path(__file__).parents[1]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    return {
        "date": date.today().isoformat(), "commit": commit, "processor": _processor(), "threads": threads,
        "level": load.chosen_level(), "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "versions": {"mha": mha.__version__, "Python": platform.python_version()}
        | {name: version(name) for name in libraries if name != "mha"},
    }  # fmt: skip


def _processor() -> str:
    """The model's name, with its number where the name is only the maker's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']} model {fields['model']})" if "cpu family" in fields else name


def write(facts: dict[str, Any], limits: dict[str, float], results: list[dict[str, Any]], goals: list[dict[str, Any]],
          folder: Path = RESULTS) -> Path:  # fmt: skip
    """The JSON file with everything."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in facts["processor"].lower()).strip("-")
    path = folder / f"cpu-{name}-{facts['level']}-{facts['threads']}-threads-{facts['date']}.json"
    contents = {"machine": facts, "limits": limits, "goals": goals, "jobs": results}
    path.write_text(json.dumps(contents, indent=1) + "\n")
    return path
