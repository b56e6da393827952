"""The benchmark runs from end to end, checks before it times, and its table is about what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.cases import Job, jobs  # noqa: E402
from bench.goals import GOALS, Goal, against  # noqa: E402
from bench.libraries import mha_calls, plain  # noqa: E402
from bench.publish import PICTURE, draw, newest, published  # noqa: E402
from bench.report import goal_table, table  # noqa: E402
from bench.truth import TOLERANCE, errors  # noqa: E402


def test_a_run_prints_a_ratio_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench", "--cases", "layer 1x16x256x8", "--rivals", "numpy", "--rounds", "1",
               "--seconds", "0.01", "--json", str(path)]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "numpy/ours" in run.stdout
    row = json.loads(path.read_text())
    assert set(row["libraries"]) == {"mha", "numpy"}
    assert 0 < row["libraries"]["mha"]["rms"] < row["libraries"]["mha"]["error"] < TOLERANCE["float32"]


JOBS = [
    Job("attention", "attention", (2, 4, 4, 60, 70, 16)),
    Job("causal", "attention", (2, 4, 4, 60, 60, 16), causal=True),
    Job("padding", "attention", (2, 4, 4, 60, 60, 16), mask="padding"),
    Job("bias", "attention", (2, 4, 4, 60, 60, 16), mask="bias"),
    Job("window", "attention", (1, 2, 2, 400, 400, 16), mask="window"),
    Job("decode", "attention", (2, 4, 1, 1, 300, 16)),
    Job("bfloat16", "attention", (2, 4, 4, 60, 60, 16), "bfloat16"),
    Job("float64", "attention", (2, 4, 4, 60, 60, 16), "float64"),
    Job("training", "training", (2, 4, 4, 60, 60, 16), causal=True),
    Job("layer", "layer", (2, 20, 32, 4)),
    Job("layer_weights", "layer_weights", (2, 20, 32, 4)),
    Job("layer_training", "layer_training", (2, 20, 32, 4)),
    Job("product", "product", (20, 30, 40)),
    Job("left", "product", (20, 30, 40), transposed="left"),
    Job("right", "product", (20, 30, 40), transposed="right", prepacked=True),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_wrong_result_is_noticed(job: Job) -> None:
    arrays = job.inputs()
    call = mha_calls(1)[job.kind](job, arrays)
    right = plain(getattr(call, "checked", call)())
    assert errors(job, arrays, right).largest < TOLERANCE[job.dtype]
    for i in range(len(right)):
        wrong = [x.astype("f8") for x in right]
        wrong[i][..., 0] += 0.1 * np.abs(wrong[i]).max()
        assert errors(job, arrays, tuple(wrong)).largest > TOLERANCE[job.dtype]


def test_names_are_unique_and_flops_positive() -> None:
    names = [job.name for job in jobs()]
    assert len(set(names)) == len(names)
    assert all(job.flops > 0 for job in jobs())
    assert Job("x", "product", (2, 3, 5)).flops == 60
    assert Job("x", "attention", (1, 4, 2, 1, 10, 8), "float16").read_bytes == 2 * 2 * 10 * 8 * 2


def test_goals_have_jobs_of_the_table() -> None:
    names = {job.name for job in jobs()}
    assert all(job.name in names for goal in GOALS for job in goal.jobs)


def test_a_goal_is_met_by_its_mean_and_its_worst() -> None:
    both = [Job("a", "product", (2, 2, 2)), Job("b", "product", (2, 2, 2))]
    goal = Goal("g", both, against("torch", "numpy"), least=1.5, floor=1.0)

    def found(a: float, b: float) -> dict:
        return goal.found({name: {"libraries": {"mha": {"best": 1.0}, "torch": {"best": t}, "numpy": {"best": 9.0}}}
                           for name, t in (("a", a), ("b", b))}, {})  # fmt: skip

    assert found(4.0, 1.0)["met"] is True
    assert found(4.0, 0.9)["met"] is False
    assert found(1.4, 1.4)["met"] is False
    assert found(4.0, 1.0)["mean"] == pytest.approx(2.0)
    assert goal.found({}, {})["met"] is None
    lines = goal_table([found(4.0, 0.9), goal.found({}, {})]).splitlines()
    assert "MISSED" in lines[2]
    assert "0.90 (b)" in lines[2]
    assert "not measured" in lines[3]
    cost = Goal("c", both[:1], lambda job, results, limits: 1.3, most=1.2)
    assert cost.found({}, {})["met"] is False


def test_the_table_is_aligned() -> None:
    lines = table([["a", "1"], ["bbb", "22"]], ["case", "us"]).splitlines()
    assert lines == ["case  us", "--------", "a      1", "bbb   22"]


def result_of(level: str, ratio: float, day: str = "2030-01-01") -> dict[str, Any]:
    """As a report writes it."""
    machine = {"date": day, "commit": "0" * 40, "processor": "P", "threads": 2, "level": level, "settings": {"X": "1"},
               "versions": {"mha": "0", "NumPy": "2"}}  # fmt: skip
    goal = {"what": "a, torch / ours", "figures": {"a": ratio, "b": 2 * ratio}, "mean": 1.4 * ratio, "worst": "a",
            "met": ratio > 1, "goal": ">= 1x"}  # fmt: skip
    unknown = goal | {"what": "never measured", "mean": None}
    limits = {"peak": 500.0, "sgemm": 200.0, "read": 40.0}
    return {"machine": machine, "limits": limits, "goals": [goal, unknown], "jobs": []}


def test_publishing_shows_the_newest_day_best_level_first(tmp_path: Path) -> None:
    for i, result in enumerate((result_of("avx2", 0.5), result_of("avx512", 2), result_of("amx", 9, "2029-12-31"))):
        (tmp_path / f"cpu-{i}.json").write_text(json.dumps(result))
    found = newest(tmp_path)
    assert list(found) == ["cpu-1.json", "cpu-0.json"]
    marks = "before\n<!-- figures: python -m bench.publish -->\nold\n<!-- end of figures -->\nafter\n"
    text = published(marks, found)
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| a, torch / ours | 2.80 | 2.00 (a) | >= 1x | met | 0.70 |" in text
    assert "never measured" not in text
    assert "avx2 with X=1" in text
    with pytest.raises(SystemExit, match="two marks"):
        published("no marks", found)
    with pytest.raises(SystemExit, match="there is no result"):
        newest(tmp_path / "empty")


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    draw(result_of("avx512", 2), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_the_readme_shows_the_committed_results() -> None:
    readme = (ROOT / "README.md").read_text()
    assert published(readme, newest()) == readme, "run `python -m bench.publish`"
    assert PICTURE.exists()
