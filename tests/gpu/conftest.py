"""Every test here runs on the emulated device, and on a real one where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import devices
import emulator
import pytest

_AVAILABLE = devices.available()


@pytest.fixture(params=[name for name, reason in _AVAILABLE.items() if reason is None])
def device(request: pytest.FixtureRequest) -> devices.Device:
    """The devices that can be used here; test_devices.py says why not the others."""
    return devices.get(request.param)


@pytest.fixture
def emulated() -> Iterator[emulator.runtime.Emulated]:
    """The emulated device's runtime; what a test changes about it is undone."""
    if _AVAILABLE["emulated"]:
        pytest.skip(_AVAILABLE["emulated"])
    runtime = emulator.install()
    before = dict(vars(runtime))
    runtime.launched.clear()
    yield runtime
    vars(runtime).update(before)
    runtime.faults = []
