"""``python -m mha info`` as text and as JSON."""

from __future__ import annotations

import json

import pytest

import mha
from mha.__main__ import main
from mha.cpu import load


def test_json_holds_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["instruction sets"]["chosen"] in facts["instruction sets"]["runnable"]
    assert "baseline" in facts["instruction sets"]["built"]
    assert facts["threads"]["used"] >= 1
    assert facts["numpy"]


def test_text_names_the_level_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    mha.show_config()
    text = capsys.readouterr().out
    assert f"chosen: {load.chosen_level()}" in text
    assert "cupy:" in text


def test_a_serial_build_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(load.runtime(), "OPENMP", 0)
    mha.show_config()
    assert "serial build" in capsys.readouterr().out


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(SystemExit):
        main(["info", "--yaml"])


def test_every_package_is_in_the_wheel() -> None:
    import tomllib
    from pathlib import Path

    root = Path(__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [".".join(path.parent.relative_to(root).parts) for path in (root / "mha").rglob("__init__.py")]
    assert sorted(listed) == sorted(found)
