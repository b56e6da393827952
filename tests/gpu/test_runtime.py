"""Where there is no GPU to run on, one sentence says why and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import devices
import fake_cupy
import pytest

import mha
from mha.compat import torch as compat
from mha.gpu import compile, load, runtime
from mha.gpu.plan import KernelPlan

#: What is wrong with CuPy -> what the message must say.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no_driver": (
        dict(driver=0, error=fake_cupy.NO_DRIVER),
        r"^CuPy 14\.2\.0 cannot use a GPU: there is no NVIDIA driver \(cudaErrorInsufficientDriver.*\)\. Install .*\.$",
    ),
    "old_driver": (
        dict(driver=11040, error=fake_cupy.NO_DRIVER),
        r"^CuPy 14\.2\.0 cannot use a GPU: cudaErrorInsufficientDriver.*; the driver is for CUDA 11\.4\. Install",
    ),
    "no_device": (dict(error=fake_cupy.NO_DEVICE), r"cannot use a GPU: cudaErrorNoDevice.*CUDA 13\.0\. Install"),
    "old_device": (
        dict(capability=(7, 0)), r"^Fake GPU has compute capability 7\.0; the GPU kernels need 7\.5.*Use NumPy arrays",
    ),
    "old_cupy": (dict(version="12.3.0"), r"^CuPy 12\.3\.0 is older than 13\.0, which the GPU kernels need\. Upgrade"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_module_on_cupy_says_what_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, expected = WRONG[name]
    cupy = fake_cupy.install(monkeypatch, **options)
    with pytest.raises(RuntimeError, match=expected) as caught:
        mha.MultiHeadAttention(8, 2, xp=cupy)
    assert type(caught.value) is RuntimeError
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    with pytest.raises(RuntimeError, match=expected):
        compat.MultiheadAttention(8, 2, device="cuda")


@pytest.mark.parametrize("name", WRONG)
def test_so_does_the_first_call_with_its_arrays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is too old makes arrays; the backend then asks for its facts before it does anything."""
    options, expected = WRONG[name]
    cupy = fake_cupy.install(monkeypatch, **options)
    with pytest.raises(RuntimeError, match=expected):
        runtime.of(cupy).facts()


def test_a_good_device_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = runtime.of(fake_cupy.install(monkeypatch, capability=(7, 5)))
    facts = found.facts()
    assert facts == runtime.DeviceFacts("Fake GPU", 75, 7, 2**16)
    assert found.facts() is facts


@pytest.mark.parametrize("error", [RuntimeError("no libnvrtc.so.13\nsearched: here"), ImportError("libnvrtc.so.13")])
def test_a_missing_compiler(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = fake_cupy.install(monkeypatch, nvrtc_error=error)
    plan = KernelPlan("attention_delta", "attention_delta", (), (1, 1), 32, 0)
    with pytest.raises(RuntimeError, match=r"^NVRTC, .* cannot be loaded: .*libnvrtc\.so\.13\. Install") as caught:
        load.kernel(runtime.of(cupy), plan)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    with pytest.raises(RuntimeError, match="NVRTC"):
        compile.compiled(load.source(plan), 90)


def test_a_library_without_a_backend() -> None:
    with pytest.raises(TypeError, match="no backend for math arrays"):
        mha.MultiHeadAttention(8, 2, xp=__import__("math"))


def test_the_real_cupy_without_a_driver() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if devices.why_no_gpu() is None:
        pytest.skip("CuPy has a device here")
    with pytest.raises(RuntimeError, match=r"^CuPy [\d.]+ cannot use a GPU: .*Install"):
        mha.MultiHeadAttention(8, 2, xp=cupy)


def test_importing_is_silent_and_leaves_cupy_alone() -> None:
    """With warnings as errors, and a CuPy whose import would fail."""
    program = (
        "import sys; sys.modules['cupy'] = None\n"
        "import numpy as np, mha\n"
        "x = np.ones((1, 2, 8), np.float32)\n"
        "layer = mha.MultiHeadAttention(8, 2); layer(x, x, x); layer.backward(x)\n"
        "assert mha.explain(x, x, x).backend == 'cpu'\n"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(mha.__file__).parents[1])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
