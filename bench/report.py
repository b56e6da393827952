"""Rows of the table, as text."""

from __future__ import annotations

from typing import Any

COLUMNS = ("case", "us", "GFLOP/s", "of peak", "of SGEMM", "extra MB", "error")


def row_of(result: dict[str, Any], peak: float, sgemm: float) -> list[str]:
    """Our figures; `ratios` are the cells that follow."""
    ours = result["libraries"].get("mha")
    if ours is None:
        return [result["job"], *[""] * (len(COLUMNS) - 1)]
    extra = ours["extra_bytes"]
    return [
        result["job"],
        f"{ours['best'] * 1e6:.0f}",
        f"{ours['gflops']:.1f}",
        f"{ours['gflops'] / peak:.0%}" if peak else "",
        f"{ours['gflops'] / sgemm:.0%}" if sgemm else "",
        "" if extra is None else f"{extra / 2**20:.1f}",
        f"{ours['error']:.0e}",
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
