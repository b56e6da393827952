"""Where the recorded cases of the other systems run: on the CPU, on the reference, and on every device there is."""

from __future__ import annotations

import sys

import devices
import pytest

_DEVICES = [name for name, reason in devices.available().items() if reason is None]


@pytest.fixture(params=["cpu", "reference", *_DEVICES])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> devices.Device:
    """NumPy for the backends of its arrays, or a library of device arrays, which answers to the device name "cuda"."""
    if request.param not in _DEVICES:
        monkeypatch.setenv("MHA_BACKEND", request.param)
        return devices.HOST
    device = devices.get(request.param)
    monkeypatch.setitem(sys.modules, "cupy", device.library)
    return device
