"""Dropout, residual link and layer norm on the device: the CPU's dropout bits, the reference's accuracy."""

from __future__ import annotations

from typing import Any

import devices
import emulator
import numpy as np
import pytest
from tolerance import DTYPES, TRUTH, assert_as_good_as_naive

from mha import gpu, reference, reference_backend
from mha.problem import COMPUTING, Dropout, Norm
from mha.random import DropoutState

STATE = DropoutState(2**63 + 5, 7)
SHAPES = [(1, 1, 1), (3, 5, 29), (2, 70, 64), (1, 33, 300), (1, 3, 2309), (0, 5, 8), (2, 0, 8), (2, 3, 0)]


def normal(*shape: int, dtype: Any, salt: int = 0) -> Any:
    return np.random.default_rng([salt, *shape]).standard_normal(shape).astype(dtype)


def on(device: devices.Device, function: Any, *arguments: Any) -> Any:
    """The backend's function with NumPy arrays put on the device and its results back."""
    there = [Norm(*map(device.put, x)) if isinstance(x, Norm) else device.put(x) for x in arguments]
    return device.get(function(*there))


def norms(features: int, dtype: Any) -> list[Norm]:
    scale, bias = (normal(features, dtype=dtype, salt=i) for i in (5, 6))
    return [Norm(None, None, 1e-5), Norm(scale, None, 0.5), Norm(None, bias, 1e-5), Norm(scale, bias, 1e-3)]


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_norm(dtype: str, p: float, device: devices.Device) -> None:
    x, residual = (normal(3, 5, 29, dtype=DTYPES[dtype], salt=i) for i in range(2))
    for kept in (None, 1.0, 0.7):
        dropout = Dropout(p, STATE, kept=kept)
        dropped = reference.output_dropout(x.astype(COMPUTING[x.dtype]), p, STATE, scale=kept)
        output, total = on(device, gpu.residual_norm, x, dropout)
        np.testing.assert_array_equal(output, dropped.astype(x.dtype))
        np.testing.assert_array_equal(total, output)
        # One rounding or two: a device multiplies and adds at once.
        output, _ = on(device, gpu.residual_norm, x, dropout, residual)
        truth = dropped.astype(TRUTH) + residual.astype(TRUTH)
        assert_as_good_as_naive(output, (dropped + residual.astype(dropped.dtype)).astype(x.dtype), truth, "output")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_as_good_as_naive(dtype: str, shape: tuple[int, ...], device: devices.Device) -> None:
    kind = DTYPES[dtype]
    x, residual, up = (normal(*shape, dtype=kind, salt=i) for i in range(3))
    if 0 in shape:
        assert [part.shape for part in on(device, gpu.residual_norm, x)] == [shape] * 2
        made = on(device, gpu.residual_norm_backward, up, x, Norm(None, None, 1e-5), None)
        assert [part.shape for part in made] == [shape] * 2 + [shape[2:]] * 2
        return
    for norm in norms(shape[2], np.float32 if dtype == "float16" else kind):
        for dropout, link in ((None, None), (Dropout(0.3, STATE), residual)):
            output, total = on(device, gpu.residual_norm, x, dropout, link, norm)
            naive, naive_total = reference_backend.residual_norm(x, dropout, link, norm)
            summed = reference.output_dropout(x.astype(TRUTH), dropout.p, STATE) if dropout else x.astype(TRUTH)
            summed = summed + (0 if link is None else link.astype(TRUTH))
            assert_as_good_as_naive(total, naive_total, summed, "total")
            assert_as_good_as_naive(output, naive, reference.layer_norm(summed, norm), "output")
            found = on(device, gpu.residual_norm_backward, up, total, norm, dropout)
            close = reference_backend.residual_norm_backward(up, total, norm, dropout)
            right = reference.layer_norm_backward(up.astype(TRUTH), total.astype(TRUTH), norm)
            assert_as_good_as_naive(found[0], close[0], right[0], "gradient of total")
            for i, name in ((2, "scale"), (3, "bias")):
                # Sums over rows that cancel: the rule's ulp are those of the terms.
                slack = 4 * np.finfo(found[i].dtype).eps * float(np.abs(up.astype(TRUTH)).sum(axis=(0, 1)).max())
                assert_as_good_as_naive(found[i], close[i], right[i - 1], f"gradient of {name}", slack)
            if dropout is None:
                np.testing.assert_array_equal(found[1], found[0])
                continue
            kept = reference.output_dropout(np.ones(shape), 0.3, STATE) != 0
            assert (found[1][~kept] == 0).all()
            tolerance = 2e-2 if x.itemsize < 4 else 1e-6
            np.testing.assert_allclose(found[1][kept].astype(float), found[0][kept].astype(float) / 0.7, rtol=tolerance)


def test_a_large_mean_is_taken_away_exactly(device: devices.Device) -> None:
    """One pass, E[x^2] - E[x]^2, would lose the spread of 1 below a mean of 10 000 in float32."""
    x = normal(2, 8, 768, dtype=np.float32) + np.float32(1e4)
    found, _ = on(device, gpu.residual_norm, x, None, None, Norm(None, None, 0.0))
    assert np.abs(found - reference.layer_norm(x.astype(TRUTH), Norm(None, None, 0.0))).max() < 2e-6


def test_a_constant_row_gives_the_bias(device: devices.Device) -> None:
    x, bias = np.full((1, 2, 40), 3.25, np.float32), normal(40, dtype=np.float32)
    output, total = on(device, gpu.residual_norm, x, None, None, Norm(None, bias, 1e-5))
    np.testing.assert_array_equal(output, np.broadcast_to(bias, x.shape))
    made = on(device, gpu.residual_norm_backward, np.ones_like(x), total, Norm(None, bias, 1e-5))
    assert np.isfinite(made[0]).all()


def test_views_and_other_memory_orders(device: devices.Device) -> None:
    x = normal(5, 3, 58, dtype=np.float32).swapaxes(0, 1)[:, :, ::2]
    norm = norms(29, np.float32)[3]
    for function, arguments in (
        (gpu.residual_norm, (x, None, x, norm)),
        (gpu.residual_norm_backward, (x, x, norm, Dropout(0.5, STATE))),
    ):
        copies = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        for one, other in zip(on(device, function, *arguments), on(device, function, *copies), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(2, 450, 40), (1, 40, 1500)])
def test_the_order_of_the_sums_is_fixed(shape: tuple[int, ...], emulated: emulator.runtime.Emulated) -> None:
    """Whichever thread comes first, and with several blocks of rows."""
    device, norm = devices.get("emulated"), norms(shape[2], np.float32)[3]
    x, up = (normal(*shape, dtype=np.float32, salt=i) for i in range(2))
    results = []
    for emulated.seed in (0, 1, 2):
        found = on(device, gpu.residual_norm_backward, up, x, norm, Dropout(0.25, STATE))
        results.append([a.tobytes() for a in found])
    assert results[0] == results[1] == results[2]
    assert emulated.launched == ["residual_norm_backward", "residual_norm_sums"] * 3
