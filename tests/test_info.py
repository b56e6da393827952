"""``python -m mha info`` as text and as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fake_cupy
import pytest

import mha
from mha.__main__ import main
from mha.cpu import load
from mha.gpu import compile, runtime
from mha.gpu import load as gpu_load


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

    root = Path(__file__).parents[1]
    options = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = [".".join(path.parent.relative_to(root).parts) for path in (root / "mha").rglob("__init__.py")]
    assert sorted(options["packages"]) == sorted(found)


def facts_of(capsys: pytest.CaptureFixture[str]) -> Any:
    mha.show_config(as_json=True)
    facts = json.loads(capsys.readouterr().out)
    mha.show_config()
    assert capsys.readouterr().out.startswith("mha: ")
    return facts


def test_every_kernel_of_the_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = facts_of(capsys)["cpu kernels"]
    sources = {path.stem for path in (Path(__file__).parents[1] / "pyx").glob("*.pyx")}
    assert {"attention_forward", "attention_decode", "product", "residual_norm"} <= set(kernels)
    assert {name.removesuffix("_backward") for name in kernels} <= sources | {"attention"}
    for entry in kernels.values():
        assert entry["chosen"] == load.chosen_level()
        assert set(entry["why not"]) == set(load.LEVELS) - {entry["chosen"]}
    monkeypatch.setattr(load, "built_levels", lambda: ("avx2", "baseline"))
    monkeypatch.setattr(load, "runnable_levels", lambda: ("baseline",))
    entry = facts_of(capsys)["cpu kernels"]["product"]
    assert "not built" in entry["why not"]["avx512"]
    assert "does not run it" in entry["why not"]["avx2"]
    monkeypatch.setattr(load, "runnable_levels", lambda: ("avx2", "baseline"))
    monkeypatch.setenv("MHA_CPU_ISA", "baseline")
    assert facts_of(capsys)["cpu kernels"]["product"]["why not"]["avx2"] == "MHA_CPU_ISA is baseline"


def test_every_kernel_of_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_cupy.install(monkeypatch)
    monkeypatch.setenv("MHA_CACHE_DIR", str(tmp_path))
    for name in ("attention_forward_1", "attention_forward_2", "attention_backward_query_1"):
        (tmp_path / f"{name}.cubin").touch()
    facts = facts_of(capsys)
    assert facts["optional"]["cupy"] == "14.2.0"
    gpu = facts["gpu"]
    assert (gpu["device"], gpu["compute capability"], gpu["multiprocessors"]) == ("Fake GPU", 9.0, 7)
    assert (gpu["nvrtc"], gpu["driver"], gpu["cache"]) == ("13.0", "for CUDA 13.0", str(tmp_path))
    assert gpu["compiled kernels"] == 3
    kernels = facts["gpu kernels"]
    folder = Path(__file__).parents[1] / "cupy_kernels"
    assert gpu["sources"] == str(folder)
    assert {entry["source"] for entry in kernels.values()} == {path.name for path in folder.glob("*.cu")}
    assert kernels["attention_combine"]["source"] == "attention_decode.cu"
    counts = {name: entry["compiled"] for name, entry in kernels.items() if entry["compiled"]}
    assert counts == {"attention_forward": 2, "attention_backward_query": 1}
    assert all(x["runnable"] and x["chosen"] and x["why not"] is None for x in kernels.values())
    monkeypatch.setenv("MHA_BACKEND", "cpu")
    entry = facts_of(capsys)["gpu kernels"]["attention_forward"]
    assert (entry["runnable"], entry["chosen"], entry["why not"]) == (True, False, "MHA_BACKEND is cpu")


@pytest.mark.parametrize(
    ("wrong", "device", "reason"),
    [
        (dict(driver=0, error=fake_cupy.NO_DRIVER), "there is no NVIDIA driver", "there is no NVIDIA driver"),
        (dict(capability=(7, 0)), "Fake GPU", "compute capability 7.0"),
        (dict(version="12.3.0"), "older than 13.0", "older than 13.0"),
        (dict(nvrtc_error=ImportError("libnvrtc")), "Fake GPU", "NVRTC, which compiles"),
    ],
)
def test_why_a_gpu_cannot_be_used(
    wrong: dict[str, Any], device: str, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cupy.install(monkeypatch, **wrong)
    facts = facts_of(capsys)
    for entry in facts["gpu kernels"].values():
        assert reason in entry["why not"]
        assert not entry["runnable"]
        assert not entry["chosen"]
    assert device in facts["gpu"]["device"]
    assert ("cannot be loaded" in facts["gpu"]["nvrtc"]) == ("nvrtc_error" in wrong)


def test_without_cupy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(runtime, "cupy", runtime.cupy.__wrapped__)
    facts = facts_of(capsys)
    assert facts["optional"]["cupy"] == facts["gpu"]["cupy"] == "not installed"
    assert {entry["why not"] for entry in facts["gpu kernels"].values()} == {"CuPy is not installed"}


def test_it_never_raises(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHA_CPU_ISA", "quantum")
    facts = facts_of(capsys)
    assert "MHA_CPU_ISA='quantum'" in facts["instruction sets"]["chosen"]
    assert "quantum" in facts["cpu kernels"]

    def broken() -> Any:
        raise OSError("broken")

    for module, name in ((load, "runtime"), (gpu_load, "folder"), (compile, "cache_folder"), (runtime, "cupy")):
        monkeypatch.setattr(module, name, broken)
    monkeypatch.delenv("MHA_CPU_ISA")
    facts = facts_of(capsys)
    assert facts["openmp"] == "OSError: broken"
    assert facts["gpu"]["sources"] == facts["gpu"]["cache"] == "broken"
    assert facts["gpu kernels"] == {}


def test_a_reason_is_said_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cupy.install(monkeypatch, driver=0, error=fake_cupy.NO_DRIVER)
    mha.show_config()
    text = capsys.readouterr().out
    assert text.partition("gpu kernels:")[2].count("there is no NVIDIA driver") == 1
    assert "attention_weights: source attention_weights.cu, compiled" in text
    assert "runnable no, chosen no (as above)" in text
