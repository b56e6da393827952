"""The products of the projections on the device, which the array library makes, in every layout a layer has."""

from __future__ import annotations

from typing import Any

import devices
import emulator
import numpy as np
import pytest
from tolerance import DTYPES, TRUTH, assert_as_good_as_naive

from mha import gpu
from mha.matrix import Matrix, heads_of, rows_of
from mha.problem import COMPUTING

SIZES = [(1, 1, 1), (1, 1, 300), (1, 65, 7), (3, 5, 0), (7, 33, 300), (97, 130, 64), (0, 3, 4)]


def normal(*shape: int, dtype: Any, salt: int = 0) -> Any:
    return np.random.default_rng([*shape, salt]).standard_normal(shape).astype(dtype)


def check(device: devices.Device, left: Matrix, right: Matrix, out: Matrix, bias: Any = None) -> Any:
    """Runs the product into `out`, whose memory comes back whole."""
    made = out._replace(array=device.put(out.array))
    gpu.product(*(x._replace(array=device.put(x.array)) for x in (left, right)), made, device.put(bias))
    found = out._replace(array=device.get(made.array))
    dtype = out.array.dtype
    computing = COMPUTING[dtype]
    naive = left.dense().astype(computing) @ right.dense().astype(computing)
    truth = left.dense().astype(TRUTH) @ right.dense().astype(TRUTH)
    if bias is not None:
        naive, truth = naive + bias.astype(computing), truth + bias.astype(TRUTH)
    # NumPy sums the products of a single row in many lanes; a matrix product sums them in one.
    single = min(left.shape[0], right.shape[1]) == 1
    slack = 8 * np.finfo(computing).eps * np.abs(truth).max(initial=0) * left.shape[1] ** 0.5 if single else 0.0
    assert_as_good_as_naive(found.dense(), naive.astype(dtype), truth, "product", float(slack))
    return found.array


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_products_with_and_without_bias_and_transposed(
    size: tuple[int, int, int], dtype: str, device: devices.Device
) -> None:
    m, n, k = size
    kind = DTYPES[dtype]
    left, right, bias = normal(m, k, dtype=kind), normal(k, n, dtype=kind), normal(n, dtype=kind, salt=1)
    for b in (None, bias):
        check(device, rows_of(left), rows_of(right), rows_of(np.full((m, n), 9, kind)), b)
        check(device, rows_of(left), rows_of(right.T.copy()).T, rows_of(np.full((m, n), 9, kind)), b)
    check(device, rows_of(left.T.copy()).T, rows_of(right.T.copy()).T, rows_of(np.full((n, m), 9, kind)).T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length_first", [False, True])
def test_heads_and_positions_in_any_order(dtype: str, length_first: bool, device: devices.Device) -> None:
    """The products of a layer and of its gradients: inputs (N, L, E) or (L, N, E), heads (N, H, L, D)."""
    kind = DTYPES[dtype]
    x = normal(9, 2, 20, dtype=kind).swapaxes(0, 1) if length_first else normal(2, 9, 20, dtype=kind)
    weight, bias = normal(20, 3 * 17, dtype=kind), normal(51, dtype=kind)
    memory = np.full((2, 3, 11, 17), 5, kind)
    for b in (None, bias):
        for wide in (memory[:, :, :9], np.full((2, 9, 3, 17), 5, kind).swapaxes(1, 2)):
            made = check(device, rows_of(x), rows_of(weight), heads_of(wide), b)
    grad = heads_of(made)
    check(device, grad, rows_of(weight).T, rows_of(np.empty_like(x)))
    check(device, rows_of(x).T, grad, rows_of(np.empty_like(weight)))
    check(device, grad.T, rows_of(x), rows_of(np.empty((51, 20), kind)))
    one = Matrix(np.broadcast_to(np.ones((1, 1), kind), (1, 18)), (0,), (1,))
    check(device, one, grad, Matrix(np.empty((1, 51), kind), (0,), (1,)))


def test_appended_rows_are_left_alone(device: devices.Device) -> None:
    out = device.put(np.full((2, 3, 11, 17), 5.0))
    x, weight = device.put(np.ones((2, 9, 20))), device.put(np.ones((20, 51)))
    gpu.product(rows_of(x), rows_of(weight), heads_of(out[:, :, :9]))
    made = device.get(out)
    assert (made[:, :, :9] == 20).all()
    assert (made[:, :, 9:] == 5).all()


def test_packed_weights(device: devices.Device) -> None:
    weight = normal(20, 30, dtype=np.float32)
    x = device.put(np.eye(20, dtype=np.float32))
    for part in (weight, weight[:, ::2], weight.T[:20, :]):
        packed = gpu.pack(rows_of(device.put(part)))
        out = device.put(np.zeros((part.shape[0], part.shape[1]), np.float32))
        gpu.product(rows_of(x[: part.shape[0], : part.shape[0]]), packed, rows_of(out))
        np.testing.assert_array_equal(device.get(out), part)


@pytest.mark.parametrize("kind", ["positions first", "samples first"])
def test_plain_matrices_are_not_copied(kind: str, emulated: emulator.runtime.Emulated, monkeypatch: Any) -> None:
    """The operands are views and the result is written in place, whichever of the two axes is the outer one."""
    given = []

    def matmul(a: Any, b: Any, out: Any = None) -> Any:
        given.extend((a.host, b.host, None if out is None else out.host))
        return emulator.arrays.matmul(a, b, out)

    monkeypatch.setattr(emulator.library, "matmul", matmul)
    shape = (2, 9, 20) if kind == "samples first" else (9, 2, 20)
    x, out = emulator.asarray(np.ones(shape)), emulator.asarray(np.empty(shape))
    if kind == "positions first":
        x, out = x.swapaxes(0, 1), out.swapaxes(0, 1)
    weight = emulator.asarray(np.ones((20, 20)))
    gpu.product(rows_of(x), rows_of(weight), rows_of(out))
    gpu.product(rows_of(x).T, rows_of(out), rows_of(weight))
    used = [x, weight, out, x, out, weight]
    assert len(given) == 6
    for found, array in zip(given, used, strict=True):
        assert found is not None
        assert np.shares_memory(found, array.host)
