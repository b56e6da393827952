"""The products of the projections and the dropout of the output, at every level and dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from shared import taken
from tolerance import DTYPES, TRUTH, assert_as_good_as_naive

from mha import cpu, optional
from mha.matrix import Matrix, heads_of, rows_of
from mha.problem import COMPUTING

SIZES = [(1, 1, 1), (1, 65, 7), (3, 5, 0), (7, 33, 300), (97, 130, 64), (100, 16, 513), (30, 200, 40), (200, 64, 257)]


def normal(*shape: int, dtype: Any, salt: int = 0) -> Any:
    return np.random.default_rng([*shape, salt]).standard_normal(shape).astype(dtype)


def check(left: Matrix, right: Matrix, out: Matrix, bias: Any = None) -> None:
    cpu.product(left, right, out, bias)
    dtype = out.array.dtype
    computing = COMPUTING[dtype]
    naive = left.dense().astype(computing) @ right.dense().astype(computing)
    truth = left.dense().astype(TRUTH) @ right.dense().astype(TRUTH)
    if bias is not None:
        naive, truth = naive + bias.astype(computing), truth + bias.astype(TRUTH)
    # NumPy sums the products of a single row in many lanes; a matrix product sums them in one.
    single = min(left.shape[0], right.shape[1]) == 1
    slack = 8 * np.finfo(computing).eps * np.abs(truth).max(initial=0) * left.shape[1] ** 0.5 if single else 0.0
    assert_as_good_as_naive(out.dense(), naive.astype(dtype), truth, "product", float(slack))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_products_with_and_without_bias_and_transposed(size: tuple[int, int, int], dtype: str, level: str) -> None:
    m, n, k = size
    kind = DTYPES[dtype]
    left, right, bias = normal(m, k, dtype=kind), normal(k, n, dtype=kind), normal(n, dtype=kind, salt=1)
    for b in (None, bias):
        check(rows_of(left), rows_of(right), rows_of(np.full((m, n), 9, kind)), b)
        check(rows_of(left), rows_of(right.T.copy()).T, rows_of(np.full((m, n), 9, kind)), b)
    check(rows_of(left.T.copy()).T, rows_of(right.T.copy()).T, rows_of(np.full((n, m), 9, kind)).T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_read_and_written_in_place(dtype: str, level: str) -> None:
    kind = DTYPES[dtype]
    x, weight = normal(2, 9, 20, dtype=kind), normal(20, 3 * 17, dtype=kind)
    memory = np.full((2, 3, 11, 17), 5, kind)
    check(rows_of(x), rows_of(weight), heads_of(memory[:, :, :9]))
    assert (memory[:, :, 9:] == 5).all(), "appended rows were touched"
    grad = heads_of(memory[:, :, :9])
    check(grad, rows_of(weight).T, rows_of(np.empty_like(x)))
    check(rows_of(x).T, grad, rows_of(np.empty_like(weight)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_few_rows_against_weights_by_rows(dtype: str, level: str) -> None:
    """Weights (out-features, in-features), heads written in place, with a bias."""
    kind = DTYPES[dtype]
    x, weight, bias = normal(2, 1, 20, dtype=kind), normal(3 * 17, 20, dtype=kind), normal(51, dtype=kind, salt=1)
    memory = np.full((2, 3, 4, 17), 5, kind)
    check(rows_of(x), rows_of(weight).T, heads_of(memory[:, :, :1]), bias)
    assert (memory[:, :, 1:] == 5).all(), "other rows were touched"


def test_a_wide_matrix_used_where_it_lies_is_not_read_past_its_end(level: str) -> None:
    memory = np.full(40 * 64 + 1, np.nan, np.float32)
    memory[:-1] = normal(40 * 64, dtype=np.float32)
    check(
        rows_of(normal(5, 40, dtype=np.float32)), rows_of(memory[:-1].reshape(40, 64)), rows_of(np.empty((5, 64), "f4"))
    )


@pytest.mark.parametrize("dtype", [name for name in DTYPES if DTYPES[name] not in (np.float32, np.float64)])
def test_half_types_round_to_nearest_even(dtype: str, level: str) -> None:
    """Through a product with 1: subnormals, ties, overflow, infinities."""
    kind = DTYPES[dtype]
    patterns = np.arange(2**16, dtype=np.uint16)
    every = patterns.view(kind)
    every = taken(every[~np.isnan(every.astype(np.float32))], level)
    out = np.empty((every.size, 1), kind)
    cpu.product(rows_of(every.reshape(-1, 1)), rows_of(np.ones((1, 1), kind)), rows_of(out))
    np.testing.assert_array_equal(out[:, 0].view(np.uint16), (every + np.zeros(1, kind)).view(np.uint16))
    finite = every[np.isfinite(every.astype(np.float32))]
    third = np.full((1, 1), 1 / 3, kind)
    out = np.empty((finite.size, 1), kind)
    cpu.product(rows_of(finite.reshape(-1, 1)), rows_of(third), rows_of(out))
    right = taken(finite.astype(np.float32) * third.astype(np.float32)[0, 0], level, kind).astype(kind)
    np.testing.assert_array_equal(out[:, 0].astype(np.float32), right.astype(np.float32))


def test_bfloat16_is_tested_where_it_can_be() -> None:
    assert ("bfloat16" in DTYPES) == (optional.bfloat16 is not None)
