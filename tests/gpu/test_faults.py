"""Faults planted in the kernels' sources: what the tests here compare does see them."""

from __future__ import annotations

from collections.abc import Callable

import devices
import emulator
import numpy as np
import pytest

from mha import cpu, gpu
from mha.gpu import load
from mha.problem import Dropout, Norm
from mha.random import DropoutState


def assert_seen(
    right: Callable[[], bool], file: str, fault: tuple[str, str], emulated: emulator.runtime.Emulated
) -> None:
    """`right` holds, and no longer with the fault (text, replacement) in the file."""
    assert fault[0] in (load.folder() / file).read_text(), "there is no such text to replace"
    assert right()
    emulated.faults = [fault]
    assert not right()


def norms_are_right(backward: bool) -> bool:
    """Rows of few features and of many, with everything that can be asked for."""
    device = devices.get("emulated")
    for shape in ((3, 37, 29), (1, 5, 2400)):
        rng = np.random.default_rng(shape)
        # A mean far above the spread, as the norm's second look at it is for.
        x, other, scale, bias = (rng.standard_normal(n) for n in (shape, shape, shape[2], shape[2]))
        x = x.astype(np.float32) + np.float32(3000)
        # A power of two: one rounding or two, the total is the same.
        norm, dropout = Norm(scale, bias, 1e-5), Dropout(0.3, DropoutState(2**63 + 5, 7), kept=0.5)
        there = Norm(device.put(scale), device.put(bias), 1e-5)
        if backward:
            up = other.astype(np.float32)
            wanted = cpu.residual_norm_backward(up, x, norm, dropout)
            found = gpu.residual_norm_backward(device.put(up), device.put(x), there, dropout)
        else:
            wanted = cpu.residual_norm(other.astype(np.float32), dropout, x, norm)
            found = gpu.residual_norm(device.put(other.astype(np.float32)), dropout, device.put(x), there)
        for one, right in zip(device.get(found), wanted, strict=True):
            if np.abs(one - right).max() > 1e-5 * np.abs(right).max():
                return False
    return True


@pytest.mark.parametrize(
    ("backward", "file", "fault"),
    [
        (False, "residual_norm.cu", ("value = kept ?", "value = !kept ?")),
        (False, "residual_norm.cu", ("return residual ? value +", "return residual ? value + value +")),
        (False, "residual_norm.cu", ("bias ? normed + bias[e]", "bias ? normed + bias[0]")),
        (False, "norm.cuh", ("norm.mean = first[0] / (Real)count", "norm.mean = 0")),
        (False, "norm.cuh", ("(x - mean - rest)", "(x - mean)")),
        (False, "norm.cuh", ("(first >> 3) + lane", "lane")),
        (False, "norm.cuh", ("first += PIECE * TEAM_WARPS", "first += 2 * PIECE * TEAM_WARPS")),
        (True, "norm.cuh", ("g - mean - x * slope", "g - mean")),
        (True, "residual_norm.cu", ("of_scale[e] + scale_sum", "scale_sum")),
        (True, "residual_norm.cu", ("if (row + r < stop) {", "{")),
        (True, "residual_norm.cu", ("kept ? g * (Real)p.keep_scale : 0", "g * (Real)p.keep_scale")),
        (True, "residual_norm.cu", ("for (int warp = 1;", "for (int warp = 2;")),
        (True, "residual_norm.cu", ("sum += ((const Real *)p.partials)", "sum = ((const Real *)p.partials)")),
    ],
)
def test_the_kernels_of_the_norm(
    backward: bool, file: str, fault: tuple[str, str], emulated: emulator.runtime.Emulated
) -> None:
    assert_seen(lambda: norms_are_right(backward), file, fault, emulated)
