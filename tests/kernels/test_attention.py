"""Every attention kernel against the error rule: levels x dtypes x cases of the table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import in_groups
from shared import prepared
from tolerance import DTYPES, TRUTH, assert_as_good_as_naive

from mha import cpu
from mha.cpu import plan
from mha.problem import Sizes

NAMES = [case.name for case in in_groups("edge", "mask", "shape")]
ALL = [(name, dtype) for name in NAMES for dtype in DTYPES]


@pytest.fixture(params=["fused", "separate"])
def backward_plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the backward, whatever the sizes would choose."""
    fused = request.param == "fused"
    original = plan.plan_backward

    def forced(sizes: Sizes, facts: plan.Facts) -> Any:
        threads = 1 if fused else 10**6
        plans = original(sizes, plan.Facts(facts.lanes, facts.itemsize, threads))
        assert plans[0].fused == fused or sizes.flops < plan._SMALL_WORK
        return plans

    monkeypatch.setattr(plan, "_SMALL_WORK", 0)
    monkeypatch.setattr(cpu, "plan_backward", forced)
    return request.param


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_forward(name: str, dtype: str, level: str) -> None:
    problem, _, _, truth, naive = prepared(name, dtype)
    output, lse, _ = cpu.attention_forward(problem)
    assert_as_good_as_naive(output, naive.output, truth.output, "output")
    assert_as_good_as_naive(lse, naive.lse, truth.lse, "lse")


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_backward(name: str, dtype: str, level: str, backward_plan: str) -> None:
    problem, arrays, _, truth, naive = prepared(name, dtype)
    output, _, rows = cpu.attention_forward(problem)
    *gradients, _ = cpu.attention_backward(problem, arrays["grad_output"], output, rows)
    slack = _cancellation(problem, arrays["grad_output"], truth)
    for which, found, close, right in zip("qkv", gradients, naive.gradients, truth.gradients, strict=True):
        assert_as_good_as_naive(found, close, right, f"gradient of {which}", slack if which != "v" else 0.0)


def _cancellation(problem: Any, grad_output: Any, truth: Any) -> float:
    """What rounding the output to its stored type costs the gradients of query and key.

    The row term of the softmax backward is taken from the stored output, a naive implementation has the weights at
    hand: P (dP - delta) differs by at most P times the rounding of one dot product of length Dv.
    """
    eps = np.finfo(problem.computing).eps
    size = np.abs(grad_output.astype(TRUTH)).max(initial=0) * np.abs(problem.value.astype(TRUTH)).max(initial=0)
    stored = 0.0 if problem.dtype == problem.computing else float(np.finfo(np.float16).eps) * 8
    reach = max(np.abs(x.astype(TRUTH)).max(initial=0) for x in (problem.query, problem.key))
    return float((2 * eps + stored) * problem.v_head_dim**0.5 * size * reach * abs(problem.scale))


@pytest.mark.parametrize("average", [False, True], ids=["per_head", "averaged"])
@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n, d in ALL if d != "float16" or "mask" in n])
def test_weights(name: str, dtype: str, average: bool, level: str) -> None:
    problem, _, _, truth, naive = prepared(name, dtype)
    _, _, rows = cpu.attention_forward(problem)
    right, close = truth.weights, naive.weights
    if average and problem.heads:
        right, close = right.mean(axis=-3), close.astype(problem.computing).mean(axis=-3).astype(problem.dtype)
    elif average:
        pytest.skip("no heads to average over")
    # NumPy sums the products of a single query in many lanes, of several (a matrix product) in one, as the kernel does.
    slack = (
        np.finfo(problem.computing).eps * problem.head_dim**0.5 * right.max(initial=0) if problem.queries == 1 else 0
    )
    assert_as_good_as_naive(cpu.attention_weights(problem, rows, average), close, right, "weights", slack)


@pytest.mark.parametrize("shape", ["full", "pairs", "keys", "rows_per_head"])
@pytest.mark.parametrize("name", ["size_33x65", "everything", "mask_float_4d", "grouped_4_2", "option_softcap",
                                  "lengths", "option_dropout", "causal_200x97"])  # fmt: skip
def test_mask_gradients(name: str, shape: str, level: str) -> None:
    problem, arrays, _, truth, naive = prepared(name, "float32")
    n, h, q, k = problem.batch, problem.heads, problem.queries, problem.keys
    target = {"full": (n, h, q, k), "pairs": (1, 1, q, k), "keys": (n, 1, 1, k), "rows_per_head": (1, h, q, k)}[shape]
    axes = tuple(i for i, size in enumerate(target) if size == 1)
    output, _, rows = cpu.attention_forward(problem)
    gradient = cpu.attention_backward(problem, arrays["grad_output"], output, rows, mask_shapes=[target])[3][0]
    close, right = (x.scores.sum(axis=axes, keepdims=True) for x in (naive, truth))
    assert_as_good_as_naive(gradient, close, right, "mask gradient", slack=1e-6 * len(axes))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["size_33x65", "everything", "option_dropout", "grouped_4_2", "mask_bool_empty_rows"])
def test_gradients_of_weights(name: str, dtype: str, level: str, backward_plan: str) -> None:
    problem, arrays, grad_weights, truth, naive = prepared(name, dtype, with_weights=True)
    output, _, rows = cpu.attention_forward(problem)
    *gradients, _ = cpu.attention_backward(problem, arrays["grad_output"], output, rows, grad_weights)
    slack = 8 * _cancellation(problem, arrays["grad_output"], truth)
    for which, found, close, right in zip("qkv", gradients, naive.gradients, truth.gradients, strict=True):
        assert_as_good_as_naive(found, close, right, f"gradient of {which}", slack)
