"""The kernels in the forms that other devices and settings choose, and what must not depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import bounds
import devices
import emulator
import numpy as np
import pytest
from cases import BY_NAME, in_groups
from problems import on_device
from tolerance import assert_as_good_as_naive

import mha
from mha import cpu, gpu
from mha.gpu import launch
from mha.random import attention_keep

#: One of each kind: head sizes, masks, dropout, grouped heads, odd sizes, decode, memory layouts.
SOME = ["size_97x200", "causal_33x65", "dims_17_33", "dims_128_40", "dims_256_256", "mask_bool_4d", "mask_float_inf",
        "option_dropout", "option_softcap", "option_scale_negative", "everything", "lengths", "grouped_6_1",
        "layout_sliced", "decode_1x1000", "decode_masked"]  # fmt: skip


def check(name: str, dtype: str, device: devices.Device, slack: float = 0.0) -> None:
    """Forward and backward keep the error rule."""
    problem, arrays, _, (host, on_host, _), truth, naive = on_device(name, dtype, device)
    output, lse, rows = gpu.attention_forward(problem)
    assert_as_good_as_naive(device.get(output), naive.output, truth.output, "output", slack)
    assert_as_good_as_naive(device.get(lse), naive.lse, truth.lse, "lse", slack)
    *gradients, _ = gpu.attention_backward(problem, arrays["grad_output"], output, rows)
    allowed = bounds.of_row_term(host, on_host["grad_output"])
    for found, close, right, more in zip(gradients, naive.gradients, truth.gradients, allowed, strict=True):
        assert_as_good_as_naive(device.get(found), close, right, "gradient", more + slack)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", [name for name in SOME if name != "dims_256_256"])
def test_without_matrix_instructions(name: str, dtype: str, emulated: emulator.runtime.Emulated) -> None:
    """As on compute capability 7.5."""
    emulated.device_facts = replace(emulated.device_facts, capability=75, shared_bytes=64 * 1024)
    check(name, dtype, devices.get("emulated"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("name", ["dims_256_256", "dims_128_40", "everything", "decode_1x1000"])
def test_with_little_shared_memory(name: str, dtype: str, emulated: emulator.runtime.Emulated) -> None:
    """As on compute capability 8.6, 8.9 and 12.0."""
    emulated.device_facts = replace(emulated.device_facts, capability=89, shared_bytes=99 * 1024)
    check(name, dtype, devices.get("emulated"))


def test_heads_too_wide_for_an_old_device_are_refused(emulated: emulator.runtime.Emulated) -> None:
    emulated.device_facts = replace(emulated.device_facts, capability=75, shared_bytes=64 * 1024)
    x = emulator.asarray(np.zeros((1, 1, 4, 200)))
    with pytest.raises(RuntimeError, match=r"float64 heads wider than 128 need compute capability 8\.0"):
        mha.scaled_dot_product_attention(x, x, x)


@pytest.fixture
def tf32() -> Iterator[None]:
    """float32 by matrix instructions."""
    mha.set_float32_precision("tf32x3")
    yield
    mha.set_float32_precision("exact")


@pytest.mark.parametrize("name", SOME)
def test_float32_in_tf32_parts(name: str, device: devices.Device, tf32: None) -> None:
    """Products of 2**-21: eight times the unit roundoff of float32, on sums of D or T terms of the case's size."""
    case = BY_NAME[name]
    arrays = case.inputs()
    most = max(
        float(np.abs(x.astype(float)).max(initial=0))
        for x in arrays.values()
        if x.dtype.kind == "f" and np.isfinite(x).all()
    )
    terms = max(case.head_dim, case.value_width, case.keys)
    check(name, "float32", device, slack=2.0**-19 * most**2 * terms**0.5)


def test_tf32_is_not_the_default(emulated: emulator.runtime.Emulated) -> None:
    problem = on_device("size_97x200", "float32", devices.get("emulated"))[0]
    assert not launch.traits(problem, emulated).tensor
    exact = gpu.attention_forward(problem)[0].host
    mha.set_float32_precision("tf32x3")
    try:
        assert launch.traits(problem, emulated).tensor
        assert not np.array_equal(gpu.attention_forward(problem)[0].host, exact)
    finally:
        mha.set_float32_precision("exact")
    with pytest.raises(ValueError, match=r"'tf32'\. Choose 'exact' or 'tf32x3'"):
        mha.set_float32_precision("tf32")


@pytest.mark.parametrize(
    "name", [case.name for case in in_groups("edge", "mask", "shape") if "dropout_p" in case.options]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_keeps_what_the_cpu_keeps(name: str, dtype: str, device: devices.Device) -> None:
    """Bit for bit, and both keep what the state says."""
    problem, _, _, (host, _, _), _, _ = on_device(name, dtype, device)
    _, _, rows = gpu.attention_forward(problem)
    found = device.get(gpu.attention_weights(problem, rows, False))
    expected = cpu.attention_weights(host, cpu.attention_forward(host)[2], False)
    dropout = host.dropout
    assert dropout is not None
    keep = attention_keep(dropout.state, dropout.p, host.batch, host.heads, host.queries, host.keys)
    np.testing.assert_array_equal(found != 0, expected != 0)
    assert not (found != 0)[~keep].any()
    assert dropout.p == 1 or (found != 0).any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("name", ["size_97x200", "everything", "option_dropout", "mask_float_inf", "decode_masked"])
def test_the_order_of_threads_changes_no_bit(name: str, dtype: str, emulated: emulator.runtime.Emulated) -> None:
    results = []
    for seed in (0, 1, 77):
        emulated.seed = seed
        problem, arrays, _, _, _, _ = on_device(name, dtype, devices.get("emulated"))
        output, lse, rows = gpu.attention_forward(problem)
        made: list[Any] = [output, lse, gpu.attention_weights(problem, rows, True)]
        made += gpu.attention_backward(problem, arrays["grad_output"], output, rows)[:3]
        results.append([x.host.tobytes() for x in made])
    assert results[0] == results[1] == results[2]
