"""Weights that lie on a device are converted there, to what NumPy gives."""

from __future__ import annotations

import numpy as np
import pytest
from devices import Device

from mha import MultiHeadAttention
from mha.convert import FROM, TO, PackedParameters, Probe, auto
from mha.packing import PackedLayout

BIASES = {f"{letter}bias": True for letter in "qkvo"}


@pytest.mark.parametrize("name", ["torch", "paddle", "keras", "gpt2", "bloom", "megatron_v1", "llama"])
def test_formats(name: str, device: Device) -> None:
    layout = PackedLayout(12, 4, **BIASES)
    host = PackedParameters(np.random.default_rng(0).standard_normal(layout.length).astype("f4"), layout)
    state = {key: device.put(np.ascontiguousarray(x)) for key, x in TO[name](host).items()}
    made = FROM[name](state, 4)
    assert isinstance(made.io_weight_bias, type(device.put(np.ones(1))))
    np.testing.assert_array_equal(device.get(made.io_weight_bias), host.io_weight_bias)
    for key, x in TO[name](made).items():
        np.testing.assert_array_equal(device.get(x), device.get(state[key]))


def test_a_probe_on_the_device(device: Device) -> None:
    layout = PackedLayout(12, 4, **BIASES)
    host = PackedParameters(np.random.default_rng(0).standard_normal(layout.length).astype("f4"), layout)
    x = np.random.default_rng(1).standard_normal((2, 5, 12)).astype("f4")
    expected, _ = MultiHeadAttention.from_parameters(host).eval()(x, x, x)
    state = {key: device.put(np.ascontiguousarray(y)) for key, y in TO["bloom"](host).items()}
    made = auto(state, 4, verify=Probe(device.put(x), device.put(expected)))
    np.testing.assert_array_equal(device.get(made.io_weight_bias), host.io_weight_bias)
