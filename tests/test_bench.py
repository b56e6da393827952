"""The benchmark runs from end to end, checks before it times, and its table is about what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.cases import Job, jobs  # noqa: E402
from bench.report import table  # noqa: E402
from bench.truth import TOLERANCE, relative_error  # noqa: E402


def test_a_run_prints_a_ratio_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench", "--cases", "layer 1x16*", "--rivals", "numpy", "--rounds", "1",
               "--seconds", "0.01", "--json", str(path)]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "numpy/ours" in run.stdout
    row = json.loads(path.read_text())
    assert set(row["libraries"]) == {"mha", "numpy"}
    assert 0 < row["libraries"]["mha"]["error"] < TOLERANCE["float32"]


@pytest.mark.parametrize("kind", ["layer", "product", "attention"])
def test_a_wrong_result_is_noticed(kind: str) -> None:
    job = next(job for job in jobs() if job.kind == kind)
    arrays = job.inputs()
    if kind == "product":
        right = arrays["left"] @ arrays["right"]
    else:
        from bench.libraries import mha_calls

        right = mha_calls(1)[kind](job, arrays)()
    assert relative_error(job, arrays, right) < TOLERANCE["float32"]
    wrong = right.copy()
    wrong[..., 0] += np.float32(1e-2) * np.abs(right).max()
    assert relative_error(job, arrays, wrong) > TOLERANCE["float32"]


def test_names_are_unique_and_flops_positive() -> None:
    names = [job.name for job in jobs()]
    assert len(set(names)) == len(names)
    assert all(job.flops > 0 for job in jobs())
    assert Job("x", "product", (2, 3, 5)).flops == 60


def test_the_table_is_aligned() -> None:
    lines = table([["a", "1"], ["bbb", "22"]], ["case", "us"]).splitlines()
    assert lines == ["case  us", "--------", "a      1", "bbb   22"]
