"""The backward against a bound for every element: fused, separate, from the statistics or the log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bounds
import numpy as np
import pytest
from cases import in_groups
from shared import prepared
from tolerance import DTYPES, assert_as_good_as_naive

import mha
from mha import cpu
from mha.cpu import launch, load
from mha.problem import RowStatistics

#: Neither queries nor keys missing: there is something to compare.
NAMES = [case.name for case in in_groups("edge", "mask", "shape") if case.batch and case.queries and case.keys]


@pytest.fixture(autouse=True)
def always_parallel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However small the problem; with 8 threads the cases have too few heads for the fused backward."""
    monkeypatch.setattr("mha.cpu.plan._SMALL_WORK", 0)
    yield
    mha.set_num_threads(None)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels called."""
    seen: list[str] = []
    original = launch.Launch.run

    def recording(self: launch.Launch, kernel: str, threads: int) -> int:
        seen.append(kernel)
        return original(self, kernel, threads)

    monkeypatch.setattr(launch.Launch, "run", recording)
    return seen


def check(found: Any, naive: Any, truth: Any, slack: bounds.Slack, what: str) -> None:
    for name, one, close, right, allowed in zip("qkv", found, naive, truth, slack, strict=False):
        assert_as_good_as_naive(one, close, right, f"gradient of {name}, {what}", allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_fused_and_separate_give_the_same_right_bits(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch, kernels: list[str]
) -> None:
    problem, arrays, _, truth, naive = prepared(name, dtype)
    pairs = (problem.batch, problem.heads, problem.queries, problem.keys)
    slack = bounds.of_row_term(problem, arrays["grad_output"])
    for level in load.runnable_levels():
        monkeypatch.setenv("MHA_CPU_ISA", level)
        output, _, rows = cpu.attention_forward(problem)
        results = []
        for threads in (1, 8):
            mha.set_num_threads(threads)
            kernels.clear()
            *gradients, scores = cpu.attention_backward(
                problem, arrays["grad_output"], output, rows, mask_shapes=[pairs]
            )
            assert ("attention_backward_query" in kernels) == (threads == 8), kernels
            results.append([x.tobytes() for x in (*gradients, *scores)])
        assert results[0] == results[1], level
        check(gradients, naive.gradients, truth.gradients, slack, level)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_log_sum_exp_alone_serves(name: str, dtype: str) -> None:
    """As `scaled_dot_product_attention_backward` has it: finite minima, where it lost the sum, included."""
    problem, arrays, _, truth, naive = prepared(name, dtype)
    output, lse, _ = cpu.attention_forward(problem)
    *gradients, _ = cpu.attention_backward(problem, arrays["grad_output"], output, RowStatistics(lse))
    slack = bounds.of_row_term(problem, arrays["grad_output"], lse=lse)
    check(gradients, naive.gradients, truth.gradients, slack, "from the log-sum-exp")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["size_33x65", "everything", "option_dropout", "grouped_4_2", "mask_bool_empty_rows",
                                  "option_softcap", "lengths", "grouped_8_2"])  # fmt: skip
def test_gradients_of_returned_weights(name: str, dtype: str) -> None:
    problem, arrays, grad_weights, truth, naive = prepared(name, dtype, with_weights=True)
    output, _, rows = cpu.attention_forward(problem)
    *gradients, _ = cpu.attention_backward(problem, arrays["grad_output"], output, rows, grad_weights)
    slack = bounds.of_row_term(problem, arrays["grad_output"], grad_weights)
    check(gradients, naive.gradients, truth.gradients, slack, "with a gradient of the weights")


@pytest.mark.parametrize("queries", [12, 2], ids=["forward", "decode"])
@pytest.mark.parametrize("threads", [1, 8], ids=["fused", "separate"])
def test_central_differences(queries: int, threads: int, level: str) -> None:
    """Nothing but the forward judges: no reference, no formula."""
    rng = np.random.default_rng(11)
    inputs = [rng.standard_normal(shape) for shape in
              [(2, 4, queries, 5), (2, 2, 19, 5), (2, 2, 19, 3), (2, 1, queries, 19)]]  # fmt: skip
    options: dict[str, Any] = dict(enable_gqa=True, window=(9, 14), softcap=3.0, scale=0.7, dropout_p=0.25,
                                   dropout_state=(3, 9), key_lengths=np.array([19, 13]))  # fmt: skip
    mha.set_num_threads(threads)
    output, lse = mha.scaled_dot_product_attention(*inputs, return_lse=True, **options)
    upstream = rng.standard_normal(output.shape)
    gradients = mha.scaled_dot_product_attention_backward(
        upstream, *inputs[:3], output, lse, inputs[3], mask_gradients=True, **options
    )
    step = 1e-5
    for name, x, gradient in zip(gradients._fields, inputs, gradients, strict=True):
        slopes = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            sides = []
            for moved in (x[index] + step, x[index] - step):
                kept, x[index] = x[index], moved
                sides.append((mha.scaled_dot_product_attention(*inputs, **options) * upstream).sum())
                x[index] = kept
            slopes[index] = (sides[0] - sides[1]) / (2 * step)
        assert np.abs(slopes - gradient).max() <= 1e-6 * np.abs(slopes).max(), name
        assert np.abs(slopes).max() > 0.1, name
