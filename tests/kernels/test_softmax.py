"""The exponential and the hyperbolic tangent of the kernels, value by value; rounding by a magic constant rounds.

The compiler must not reassociate (x + magic) - magic to x: the exponential would then be wrong by any factor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tolerance import TRUTH

from mha import cpu
from mha.masks import MaskSpec
from mha.problem import AttentionProblem, RowStatistics

#: Below these the exponential is exactly 0.
SMALLEST = {"float32": -87.0, "float64": -708.0}
both = pytest.mark.parametrize("dtype", SMALLEST)


def ulps(found: Any, truth: Any) -> Any:
    return np.abs(found.astype(TRUTH) - truth) / np.spacing(np.abs(truth).astype(found.dtype)).astype(TRUTH)


def exponential(x: Any) -> Any:
    """exp(x) as the kernels compute it: the weights of one query, keys x, with shift 0 and no scale."""
    keys = x.reshape(1, -1, 1)
    problem = AttentionProblem.build(np.ones((1, 1, 1), x.dtype), keys, keys, MaskSpec(), 1.0)
    return cpu.attention_weights(problem, RowStatistics(np.zeros((1, 1), x.dtype)), False).reshape(-1)


@both
def test_exponential_within_two_ulp(dtype: str, level: str) -> None:
    rng = np.random.default_rng(0)
    spread = np.concatenate([rng.uniform(SMALLEST[dtype], 0, 40_000), rng.uniform(-2, 2, 20_000), [0.0, -0.0],
                             np.geomspace(1e-30, 1, 3000), -np.geomspace(1e-30, 1, 3000)])  # fmt: skip
    # Halfway between two multiples of ln 2 the rounding decides; so do the neighbours.
    halves = (np.arange(int(SMALLEST[dtype]) + 1, 0) + 0.5) * np.log(2)
    halves = halves[halves > SMALLEST[dtype]]
    x = np.concatenate(
        [spread, halves, np.nextafter(halves.astype(dtype), 0), np.nextafter(halves.astype(dtype), -1e9)]
    )
    x = x.astype(dtype)
    error = ulps(exponential(x), np.exp(x.astype(TRUTH)))
    assert error.max() <= 2, (error.max(), x[error.argmax()])
    assert (exponential(np.zeros(3, dtype)) == 1).all()


@both
def test_exponential_is_monotone_where_the_multiple_of_ln_2_changes(dtype: str, level: str) -> None:
    center = np.float64(np.log(2)) * (np.arange(-60, 0) + 0.5)
    steps = np.arange(-40, 41) * np.finfo(dtype).eps * 4
    x = (center[:, None] * (1 - steps)).astype(dtype)
    found = exponential(x.reshape(-1)).reshape(x.shape)
    assert (np.diff(found, axis=1) >= -np.spacing(found[:, 1:]) * 2).all()


@both
def test_exponential_of_very_small_values_is_exactly_zero(dtype: str, level: str) -> None:
    smallest = SMALLEST[dtype]
    lowest = float(np.finfo(dtype).min)
    x = np.array([smallest * 1.001, smallest * 2, -1e30, lowest, -np.inf], dtype)
    assert (exponential(x) == 0).all()
    assert exponential(np.array([smallest], dtype))[0] > 0
    assert np.isnan(exponential(np.array([np.nan], dtype))[0])


@both
@pytest.mark.parametrize("queries", ["many", "one"], ids=["forward", "decode"])
@pytest.mark.parametrize("cap", [1.0, 5.0, 0.3])
def test_softcap_within_three_ulp(cap: float, queries: str, dtype: str, level: str) -> None:
    """The log-sum-exp of a single key is its capped score. Division and product by the cap round as well."""
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.uniform(-30, 30, 5000), rng.uniform(-1, 1, 10_000), np.geomspace(1e-30, 1, 1000),
                        [0.0, 1e30, -1e30, 0.625 * cap, -0.625 * cap]]).astype(dtype)  # fmt: skip
    query = x.reshape((1, -1, 1) if queries == "many" else (-1, 1, 1))
    one = np.ones((query.shape[0], 1, 1), dtype)
    problem = AttentionProblem.build(query, one, one, MaskSpec(), 1.0, cap)
    found = cpu.attention_forward(problem)[1].reshape(-1)
    truth = TRUTH(cap) * np.tanh(x.astype(TRUTH) / TRUTH(cap))
    error = np.where(truth == 0, np.where(found == 0, 0, np.inf), ulps(found, truth))
    assert error.max() <= 3, (error.max(), x[error.argmax()])


@both
@pytest.mark.parametrize("queries", [40, 3], ids=["forward", "decode"])
def test_peaked_rows_pick_their_key(queries: int, dtype: str, level: str) -> None:
    """Scores far apart, growing and falling along the keys, so that the running maximum moves in every block."""
    rng = np.random.default_rng(2)
    values = rng.standard_normal((1, 1, 300, 4)).astype(dtype)
    for order in (np.arange(300), np.arange(300)[::-1], rng.permutation(300)):
        keys = (order * -2 * SMALLEST[dtype]).reshape(1, 1, 300, 1).astype(dtype)
        query = np.ones((1, 1, queries, 1), dtype)
        problem = AttentionProblem.build(query, keys, values, MaskSpec(), 1.0)
        output, lse, rows = cpu.attention_forward(problem)
        best = int(order.argmax())
        assert (output == values[:, :, best : best + 1]).all()
        assert (lse == keys.max()).all()
        weights = cpu.attention_weights(problem, rows, False)
        assert (weights[..., best] == 1).all()
        assert weights.sum() == queries
        gradients = cpu.attention_backward(problem, np.ones_like(output), output, rows)
        assert (gradients[0] == 0).all()
        assert (gradients[1] == 0).all()
        assert (gradients[2][:, :, best] == queries).all()


@both
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("scale", [0.125, 0.1118034, 0.7])
def test_one_key_gives_its_value_and_a_weight_of_one(scale: float, queries: int, dtype: str, level: str) -> None:
    """Whatever the scale rounds to: the largest score less itself is 0."""
    rng = np.random.default_rng(0)
    query, value = (rng.standard_normal((2, 3, n, 33)).astype(dtype) * 5 for n in (queries, 1))
    problem = AttentionProblem.build(query, value, value, MaskSpec(), scale)
    output, _, rows = cpu.attention_forward(problem)
    assert (output == value).all()
    if queries > 1:  # the decode kernel adds the terms of a score in another order than the weights do
        assert (cpu.attention_weights(problem, rows, False) == 1).all()


@both
def test_subnormal_input_is_not_lost(dtype: str, level: str) -> None:
    """Values of the size of the smallest normal number and below pass through to the last bit where one key is seen."""
    tiny = np.finfo(dtype).smallest_subnormal * np.arange(1, 257).astype(dtype)
    value = tiny.reshape(1, 1, 1, 256)
    query = np.ones((1, 1, 20, 4), dtype)
    problem = AttentionProblem.build(query, query[:, :, :1], value, MaskSpec(), 1.0)
    output, _, rows = cpu.attention_forward(problem)
    assert (output == value).all()
    gradient = cpu.attention_backward(problem, np.broadcast_to(value, output.shape).copy(), output, rows)[2]
    assert (gradient == 20 * value).all()
