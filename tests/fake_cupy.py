"""A CuPy that has no more than what the package asks one about: its version, driver, device and compiler."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mha.gpu import runtime


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""


NO_DRIVER = CUDARuntimeError(
    "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
)
NO_DEVICE = CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")


def install(
    monkeypatch: pytest.MonkeyPatch,
    version: str = "14.2.0",
    driver: int = 13000,
    capability: tuple[int, int] = (9, 0),
    error: Exception | None = None,
    nvrtc_error: Exception | None = None,
) -> Any:
    """Put one in CuPy's place; `error` is what every question about a device gives."""

    def or_error(value: Any, error: Exception | None) -> Any:
        def function(*_: Any) -> Any:
            if error is not None:
                raise error
            return value

        return function

    properties = {
        "name": b"Fake GPU", "major": capability[0], "minor": capability[1], "multiProcessorCount": 7,
        "sharedMemPerBlockOptin": 2**16,
    }  # fmt: skip
    cupy: Any = ModuleType("cupy")
    cupy.__version__ = version
    cupy.ndarray = type("ndarray", (), {"__module__": "cupy"})
    cupy.zeros = or_error(None, error)
    cupy.cuda = ModuleType("cupy.cuda")
    cupy.cuda.runtime = SimpleNamespace(
        getDevice=or_error(0, error), getDeviceProperties=or_error(properties, error),
        driverGetVersion=or_error(driver, None),
    )  # fmt: skip
    cupy.cuda.nvrtc = SimpleNamespace(getVersion=or_error((13, 0), nvrtc_error))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy.cuda)
    monkeypatch.setattr(runtime, "cupy", runtime.cupy.__wrapped__)
    return cupy
