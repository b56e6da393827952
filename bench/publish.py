"""``python -m bench.publish``: the picture and the table of README.md, from the files that --report wrote.

Those of the newest day in `bench/results/`: the best instruction-set level in full, the means of the others beside it.
Needs matplotlib.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.report import RESULTS
from mha.cpu.load import LEVELS

ROOT = Path(__file__).resolve().parents[1]
PICTURE = RESULTS / "cpu.png"
_SECTION = re.compile(r"(<!-- figures: python -m bench\.publish -->\n).*?(<!-- end of figures -->)", re.DOTALL)
_VERDICT = {True: "met", False: "**missed**", None: ""}


def newest(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The results of the newest day by their files' names, best level first."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("cpu-*.json"))}
    if not found:
        raise SystemExit(f"there is no result in {folder}. Run `python -m bench --report` first.")
    day = max(result["machine"]["date"] for result in found.values())
    ofday = [name for name in found if found[name]["machine"]["date"] == day]
    return {name: found[name] for name in sorted(ofday, key=lambda name: LEVELS.index(found[name]["machine"]["level"]))}


def section(results: dict[str, dict[str, Any]]) -> str:
    """What stands between README's two marks: machine, picture and table of goals."""
    name, result = next(iter(results.items()))
    machine, limits = result["machine"], result["limits"]
    others = [other for other in results.values() if other is not result]
    versions = ", ".join(f"{library} {version}" for library, version in machine["versions"].items())
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, level {machine['level']}; {versions}; "
        f"{machine['date']}, commit {machine['commit'][:10]}. Limits measured in the same run: multiply-adds "
        f"{limits['peak']:.0f} GFLOP/s, NumPy's SGEMM {limits['sgemm']:.0f} GFLOP/s, reading memory "
        f"{limits['read']:.0f} GB/s. Ratios are best times, the rival's over ours, interleaved, one process a library; "
        f"means are geometric. Command: `python -m bench --report`; every case is in `bench/results/{name}`.",
        "",
        f"![Ratios by goal]({PICTURE.relative_to(ROOT)})",
        "",
    ]
    header = ["", "mean", "worst", "wanted", "", *(other["machine"]["level"] for other in others)]
    lines += [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for i, one in enumerate(result["goals"]):
        if one["mean"] is not None:
            worst = f"{one['figures'][one['worst']]:.2f} ({one['worst']})" if len(one["figures"]) > 1 else ""
            means = [other["goals"][i]["mean"] for other in others]
            cells = [one["what"], f"{one['mean']:.2f}", worst, one["goal"], _VERDICT[one["met"]]]
            cells += ["" if mean is None else f"{mean:.2f}" for mean in means]
            lines.append(f"| {' | '.join(cells)} |")
    if others:
        limited = "; ".join(
            f"{other['machine']['level']} with {' '.join(f'{k}={v}' for k, v in other['machine']['settings'].items())}"
            for other in others
        )
        lines += [
            "",
            f"The last columns are means with these settings, which other libraries may pass over: {limited}.",
        ]
    return "\n".join(lines) + "\n"


def published(readme: str, results: dict[str, dict[str, Any]]) -> str:
    """README.md with the section of these results."""
    text, count = _SECTION.subn(lambda match: f"{match[1]}{section(results)}{match[2]}", readme)
    if count != 1:
        raise SystemExit("README.md has not the two marks of the figures, once each.")
    return text


def draw(result: dict[str, Any], path: Path) -> None:
    """Every case as a dot, by goal, on a logarithmic axis of ratios; goals in other units are left to the table."""
    from matplotlib.figure import Figure

    goals = [one for one in result["goals"] if one["mean"] is not None and one["what"].endswith("/ ours")]
    figure = Figure(figsize=(9, 0.32 * len(goals) + 1.1), layout="constrained")
    axes = figure.subplots()
    for i, one in enumerate(goals):
        axes.plot(list(one["figures"].values()), [i] * len(one["figures"]), "o", color="#7aa6c2", markersize=4)
        axes.plot([one["mean"]], [i], "|", color="#12395b", markersize=16, markeredgewidth=2.5)
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 4, 8, 16, 32]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(goals)), [one["what"].removesuffix(" / ours") for one in goals], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_xlabel("times as fast as the library named; dots are cases, bars their geometric mean", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    newest_results = newest()
    readme = ROOT / "README.md"
    readme.write_text(published(readme.read_text(), newest_results))
    draw(next(iter(newest_results.values())), PICTURE)
    print(f"README.md and {PICTURE.relative_to(ROOT)} show {', '.join(newest_results)}")
