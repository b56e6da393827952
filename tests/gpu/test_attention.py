"""The attention kernels of the GPU against the error rule: devices x dtypes x cases of the table."""

from __future__ import annotations

import devices
import pytest
from cases import BY_NAME, call_options, in_groups
from shared import prepared
from tolerance import DTYPES, assert_as_good_as_naive

import mha

NAMES = [case.name for case in in_groups("edge", "mask", "shape")]
ALL = [(name, dtype) for name in NAMES for dtype in DTYPES]


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_forward(name: str, dtype: str, device: devices.Device) -> None:
    _, arrays, _, truth, naive = prepared(name, dtype)
    query, key, value = (device.put(arrays[part]) for part in ("query", "key", "value"))
    options = device.put(call_options(BY_NAME[name], arrays))
    output, lse = mha.scaled_dot_product_attention(query, key, value, return_lse=True, **options)
    assert isinstance(output, device.library.ndarray)
    assert_as_good_as_naive(device.get(output), naive.output, truth.output, "output")
    assert_as_good_as_naive(device.get(lse), naive.lse, truth.lse, "lse")
