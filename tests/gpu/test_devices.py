"""Which devices the tests here run on."""

from __future__ import annotations

import devices
import emulator
import numpy as np
import pytest


@pytest.mark.parametrize("name", list(devices.available()))
def test_can_be_used(name: str) -> None:
    reason = devices.available()[name]
    if reason:
        pytest.skip(f"no GPU test runs on the {name} device: {reason}")
    device = devices.get(name)
    x = np.arange(24.0).reshape(2, 3, 4)[:, ::2, 1:]
    there = device.put(x)
    assert there.strides == x.strides
    np.testing.assert_array_equal(device.get(there), x)


def test_emulated_arrays_do_not_mix_with_numpys() -> None:
    host, device = np.ones(3), emulator.asarray(np.ones(3))
    for mixed in (lambda: device + host, lambda: host + device, lambda: emulator.library.concatenate([device, host]),
                  lambda: np.asarray(device)):  # fmt: skip
        with pytest.raises(TypeError):
            mixed()
