"""Every instruction wrapped in prim.cuh does what NumPy says it should: on the emulated device, and on a real one.

Where both are at hand their bits are compared with the same statement, so the emulator is held to the hardware.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import devices
import ml_dtypes
import numpy as np
import pytest

from mha.gpu import load, runtime
from mha.gpu.runtime import Source

HERE = Path(__file__).parent
CASES = ["CONVERSIONS", "EXP2", "LDMATRIX", "MMA_FLOAT16", "MMA_BFLOAT16", "MMA_TF32", "MMA_FLOAT64", "COPIES"]


def source(case: str) -> Source:
    """What is compiled for a case."""
    files = {**dict(load.files("attention_delta")), "conformance.cu": (HERE / "conformance.cu").read_text()}
    return Source("conformance", "conformance", (("MHA_CASE", CASES.index(case)),), tuple(files.items()))


def run(device: devices.Device, case: str, given: Any, made: Any, blocks: int = 1) -> Any:
    """The kernel of a case with these operands; `made` is an array like the result."""
    host = runtime.of(device.library)
    kernel = host.load(source(case), 2048)
    there, out = device.library.asarray(given), device.library.asarray(np.full_like(made, 77))
    block = bytearray(struct.pack("@qq", host.address(there), host.address(out)))
    host.launch(kernel, (blocks, 1), 32, 2048, block)
    return device.get(out)


def bits(x: Any) -> Any:
    """Of float32."""
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


@pytest.fixture
def hard() -> Any:
    """float32 values where rounding is hard: halves, limits, numbers below the normal ones, what is not finite."""
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 65504, 65520, 65519.99, 1e-8, 5.9604645e-8, 2.9802322e-8,
               6.1e-5, 3.3895314e38, 3.4e38,
               1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-9]  # fmt: skip
    drawn = rng.standard_normal(2048 - len(special)) * np.exp2(rng.integers(-30, 20, 2048 - len(special)))
    return np.concatenate([special, drawn]).astype(np.float32)


def test_conversions(hard: Any, device: devices.Device) -> None:
    blocks = len(hard) // 64
    out = run(device, "CONVERSIONS", hard, np.zeros((len(hard) // 2, 8), np.uint32), blocks)
    x, y = (hard.reshape(blocks, 2, 32)[:, i].reshape(-1) for i in (0, 1))
    number = ~np.isnan(x)
    both = number & ~np.isnan(y)
    with np.errstate(over="ignore"):
        half, brain = (v.astype(t) for v, t in ((x, np.float16), (x, ml_dtypes.bfloat16)))
        half_y, brain_y = y.astype(np.float16), y.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(out[number, 0], half.view(np.uint16)[number])
    np.testing.assert_array_equal(out[number, 1], brain.view(np.uint16)[number])
    np.testing.assert_array_equal(out[number, 2], bits(half)[number])
    np.testing.assert_array_equal(out[number, 3], bits(brain)[number])
    assert (out[:, 4] == 0x7F800000).all()
    # To 10 bits behind the point, halves away from zero.
    finite = np.isfinite(x)
    np.testing.assert_array_equal(out[finite, 5], (bits(x)[finite] + 0x1000) & 0xFFFFE000)
    for column, low, high in ((6, half, half_y), (7, brain, brain_y)):
        packed = low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << 16
        np.testing.assert_array_equal(out[both, column], packed[both])
    for column in (2, 3):
        assert np.isnan(out[~number, column].view(np.float32)).all()


def test_exp2_fast(device: devices.Device) -> None:
    x = np.concatenate([np.linspace(-125, 10, 4000), [0.0, -np.inf, -1000.0, np.inf], np.zeros(28)]).astype(np.float32)
    found = run(device, "EXP2", x, np.zeros_like(x), len(x) // 32)
    ordinary = np.isfinite(x) & (x > -200)
    right = np.exp2(x[ordinary].astype(np.float64))
    assert np.abs(found[ordinary] / right - 1).max() < 2.0**-22
    assert found[x == -1000] == 0
    assert found[x == -np.inf] == 0
    assert found[x == np.inf] == np.inf


def test_ldmatrix(device: devices.Device) -> None:
    elements = np.arange(256, dtype=np.uint16) * 251
    out = run(device, "LDMATRIX", elements, np.zeros((2, 32, 4), np.uint32))
    matrices = elements.reshape(4, 8, 8)
    for transposed, found in enumerate(out):
        for lane in range(32):
            for m in range(4):
                source = matrices[m].T if transposed else matrices[m]
                low, high = (int(source[lane // 4, 2 * (lane % 4) + h]) for h in (0, 1))
                assert found[lane, m] == low | high << 16, (transposed, lane, m)


def operands(case: str, exact: bool) -> tuple[Any, Any, Any]:
    """a (16, K), b (K, 8), c (16, 8); small whole numbers make every sum exact."""
    rng = np.random.default_rng(3)
    k = {"MMA_TF32": 8}.get(case, 16)
    draw = (lambda *s: rng.integers(-8, 9, s)) if exact else (lambda *s: rng.standard_normal(s))
    return tuple(draw(*s).astype(np.float32) for s in ((16, k), (k, 8), (16, 8)))  # type: ignore[return-value]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "random"])
@pytest.mark.parametrize("case", ["MMA_FLOAT16", "MMA_BFLOAT16", "MMA_TF32"])
def test_mma(case: str, exact: bool, device: devices.Device) -> None:
    a, b, c = operands(case, exact)
    kind = {"MMA_FLOAT16": np.float16, "MMA_BFLOAT16": ml_dtypes.bfloat16}.get(case)
    given = np.zeros((32, 10), np.uint32)
    if kind is None:
        a, b = (((bits(x) + 0x1000) & 0xFFFFE000).view(np.float32).reshape(x.shape) for x in (a, b))
    else:
        a, b = a.astype(kind), b.astype(kind)
    for lane in range(32):
        g, t = divmod(lane, 4)
        if kind is None:
            given[lane, :6] = bits([a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4], b[t, g], b[t + 4, g]])
        else:
            pairs = [a[g + 8 * (i & 1), 2 * t + 8 * (i >> 1) :][:2] for i in range(4)]
            pairs += [b[2 * t + 8 * i :, g][:2] for i in range(2)]
            given[lane, :6] = [int(p.view(np.uint16)[0]) | int(p.view(np.uint16)[1]) << 16
                               for p in map(np.ascontiguousarray, pairs)]  # fmt: skip
        given[lane, 6:] = bits([c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]])
    out = run(device, case, given, np.zeros((32, 4), np.float32))
    right = c.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)
    found = np.zeros((16, 8), np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            found[g + 8 * (i >> 1), 2 * t + (i & 1)] = out[lane, i]
    if exact:
        np.testing.assert_array_equal(found, right)
    # Hardware truncates where it aligns the terms: a few units of the largest.
    reach = np.abs(c) + np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
    assert (np.abs(found - right) <= 2.0**-21 * reach).all()


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "random"])
def test_mma_float64(exact: bool, device: devices.Device) -> None:
    rng = np.random.default_rng(4)
    draw = (lambda *s: rng.integers(-1000, 1000, s).astype(float)) if exact else (lambda *s: rng.standard_normal(s))
    a, b, c = draw(8, 4), draw(4, 8), draw(8, 8)
    given = np.array([[a[i // 4, i % 4], b[i % 4, i // 4], c[i // 4, 2 * (i % 4)], c[i // 4, 2 * (i % 4) + 1]]
                      for i in range(32)])  # fmt: skip
    out = run(device, "MMA_FLOAT64", given, np.zeros((32, 2)))
    found, right = out.reshape(8, 4, 2).reshape(8, 8), c + a @ b
    if exact:
        np.testing.assert_array_equal(found, right)
    assert (np.abs(found - right) <= 2.0**-51 * (np.abs(c) + np.abs(a) @ np.abs(b))).all()


def test_copies(device: devices.Device) -> None:
    given = np.random.default_rng(5).integers(1, 255, 1024).astype(np.uint8)
    out = run(device, "COPIES", given, np.zeros(1024, np.uint8)).reshape(2, 32, 16)
    source = given.reshape(2, 32, 16)
    for lane in range(32):
        other = 31 - lane
        np.testing.assert_array_equal(out[0, lane], source[0, other] if other % 3 else 0)
        np.testing.assert_array_equal(out[1, lane], source[1, other])


WRAPPER = r"^(?:template <[^>]*> )?(?:__device__ __forceinline__|inline|UNSEEN inline) [\w ]+?\**(\w+)\("


def test_every_wrapper_is_in_both_files_and_used_here() -> None:
    names = {}
    for path in (load.folder() / "prim.cuh", HERE.parent / "emulator" / "prim.cuh"):
        found = re.findall(WRAPPER, path.read_text(), re.MULTILINE)
        names[path] = set(found) - {"ldmatrix", "mma_16"}  # the emulator's own helpers
    product, emulated = names.values()
    assert product == emulated
    used = (HERE / "conformance.cu").read_text()
    assert {name for name in product if f"{name}(" not in used and f"{name}<" not in used} == set()
