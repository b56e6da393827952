"""The GPU bench as far as it goes without a GPU: rows, figures, goals, table, file, messages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import gpu, gpu_cases, gpu_report
from bench.gpu_cases import Goal, Row


def test_work_of_a_row() -> None:
    row = Row("forward", "bfloat16", 1024, 64, batch=2, heads=4, kv_heads=4)
    assert row.flops == 4 * 2 * 4 * 1024 * 1024 * 64
    assert Row("backward", "bfloat16", 1024, 64, True, batch=2, heads=4, kv_heads=4).flops == row.flops * 1.25
    decode = Row("decode", "bfloat16", 1024, 64, batch=2, heads=8, kv_heads=2, queries=1)
    assert decode.flops == 4 * 2 * 8 * 1024 * 64
    assert decode.read_bytes == 2 * 2 * 2 * 1024 * 64 * 2


def test_rows_are_those_promised() -> None:
    names = [row.name for row in gpu_cases.ROWS]
    assert len(set(names)) == len(names)
    training = [row for row in gpu_cases.ROWS if row.dtype == "bfloat16" and row.kind != "decode"]
    assert {row.batch * row.length for row in training} == {16384}
    assert {row.heads * row.head_dim for row in training} == {2048}
    assert {row.length for row in training} == {512, 1024, 2048, 4096, 8192, 16384}
    assert all(row.read_bytes >= 2**30 for row in gpu_cases.ROWS if row.kind == "decode")
    assert {row.dtype for row in gpu_cases.ROWS} == {"bfloat16", "float16", "float32", "float64"}


def test_figures_and_goals() -> None:
    row = Row("forward", "bfloat16", 8192, 128, batch=2)
    found = gpu_report.figures(row, {"mha": 2.0, "FLASH": 1.9}, {"CUDNN": "refused"}, 1e12)
    assert found["tflops"]["mha"] == row.flops / 2e12
    assert found["goals"] == [{"goal": "share of FLASH >= 0.9", "found": 0.95, "met": True}]
    slower = gpu_report.figures(row, {"mha": 2.0, "FLASH": 1.7}, {}, 1e12)
    assert slower["goals"][0]["met"] is False
    assert gpu_report.figures(row, {"mha": 2.0}, {}, 1e12)["goals"][0]["met"] is None
    decode = Row("decode", "bfloat16", 2**20, 128, kv_heads=1, queries=1)
    assert gpu_report.figures(decode, {"mha": 1.0}, {}, 2.0 * decode.read_bytes)["measures"]["share of copy"] == 0.5
    assert str(Goal("TFLOP/s", 35.0)) == "TFLOP/s >= 35"


def test_table_and_file(tmp_path: Path) -> None:
    rows = [Row("forward", "bfloat16", 8192, 128, batch=2), Row("forward", "float64", 2048, 64)]
    found = [gpu_report.figures(rows[0], {"mha": 2e-3, "FLASH": 1e-3}, {}, 1e12),
             gpu_report.figures(rows[1], {"mha": 1e-3}, {}, 1e12)]  # fmt: skip
    text = gpu_report.table(found)
    assert "share of FLASH >= 0.9: 0.50 MISSED" in text
    assert "times MATH >= 2: not measured" in text
    path = gpu_report.write(
        {"gpu": "NVIDIA X1", "date": "2026-01-02"}, {"copy": 1.0}, {"call us": 9.0}, found, tmp_path
    )
    assert path.name == "gpu-nvidia-x1-2026-01-02.json"
    assert [one["row"] for one in json.loads(path.read_text())["rows"]] == [row.name for row in rows]


def test_dry_run_lists_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--only", "decode"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(row.kind == "decode" for row in gpu_cases.ROWS)


def test_without_a_device_there_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("no GPU to time on: ")
