"""Few queries against many keys: the split of the keys, its limits, and agreement with the other forward kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import Case
from shared import expected, problem_of
from tolerance import TRUTH, assert_as_good_as_naive

import mha
from mha import cpu
from mha.cpu import launch, plan
from mha.problem import Sizes

#: Around the multiples of the keys that a split and a panel of any level hold.
LENGTHS = (1, 15, 16, 17, 255, 256, 257, 511, 512, 513, 8191, 8192, 8193, 12_345)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[plan.AttentionPlan]:
    """The plans that were made."""
    seen: list[plan.AttentionPlan] = []
    original = plan.plan_forward

    def recording(sizes: Sizes, facts: plan.Facts) -> plan.AttentionPlan:
        seen.append(original(sizes, facts))
        return seen[-1]

    monkeypatch.setattr(cpu, "plan_forward", recording)
    return seen


def both_kernels(problem: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Output and log-sum-exp of the decode, then of the kernel for many queries."""
    results = []
    for rows in (8, 0):
        monkeypatch.setattr(plan, "_DECODE_ROWS", rows)
        results.append(cpu.attention_forward(problem)[:2])
    return results


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("keys", LENGTHS)
def test_any_number_of_keys(
    keys: int, dtype: Any, level: str, plans: list[plan.AttentionPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(f"decode_any_{keys}", "", batch=1, heads=2, kv_heads=1, queries=2, keys=keys, head_dim=9, v_head_dim=21)
    arrays = case.inputs(dtype)
    problem = problem_of(case, arrays)
    truth = expected(problem, arrays["grad_output"], TRUTH)
    naive = expected(problem, arrays["grad_output"], problem.computing)
    for output, lse in both_kernels(problem, monkeypatch):
        assert_as_good_as_naive(output, naive.output.astype(dtype), truth.output, "output")
        assert_as_good_as_naive(lse, naive.lse, truth.lse, "lse")
    assert [p.kernel for p in plans] == ["attention_decode", "attention_forward"]
    assert plans[0].splits == max(1, min(32, keys // 256))


@pytest.mark.parametrize("options", [{"key_lengths": np.array([0, 700, 3000])}, {"window": 300, "causal_offset": 2500},
                                     {"is_causal": True, "causal_offset": np.array([-1, 0, 1500])}],
                         ids=["lengths", "window", "offsets"])  # fmt: skip
def test_splits_that_see_nothing_add_nothing(
    options: dict[str, Any], level: str, plans: list[plan.AttentionPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of the parts are empty for some samples, all of them for one."""
    case = Case("decode_empty_splits", "", batch=3, heads=1, queries=3, keys=3000, options=options)
    arrays = case.inputs(np.float32)
    problem = problem_of(case, arrays)
    truth = expected(problem, arrays["grad_output"], TRUTH)
    naive = expected(problem, arrays["grad_output"], np.float32)
    for output, lse in both_kernels(problem, monkeypatch):
        assert_as_good_as_naive(output, naive.output, truth.output, "output")
        assert_as_good_as_naive(lse, naive.lse, truth.lse, "lse")
    assert plans[0].splits > 5


@pytest.mark.parametrize("hole", [0, 255, 256, 1000, 2999])
def test_one_visible_key_in_any_split(hole: int, level: str) -> None:
    case = Case("decode_hole", "", batch=1, heads=1, queries=1, keys=3000)
    arrays = case.inputs(np.float32)
    keep = np.zeros((1, 3000), bool)
    keep[0, hole] = True
    for x in ("key", "value"):
        arrays[x][:, :, ~keep[0]] = np.nan
    output, lse = mha.scaled_dot_product_attention(*(arrays[x] for x in ("query", "key", "value")), keep,
                                                   return_lse=True)  # fmt: skip
    np.testing.assert_array_equal(output, arrays["value"][:, :, hole : hole + 1])
    score = (arrays["query"].astype(float) * arrays["key"][:, :, hole : hole + 1]).sum() / 4
    np.testing.assert_allclose(lse, score, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["attention_decode", "attention_forward"])
def test_partial_results_have_their_room(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory and partials are filled with NaN first: nothing is read before it is written."""
    original = launch._aligned

    def filled(size: int) -> Any:
        memory = original(size)
        memory[...] = 0xFF
        return memory

    monkeypatch.setattr(launch, "_aligned", filled)
    queries = 2 if kernel == "attention_decode" else 40
    case = Case("decode_dirty", "", batch=2, heads=3, kv_heads=1, queries=queries, keys=1500, head_dim=9, v_head_dim=5)
    arrays = case.inputs(np.float32)
    problem = problem_of(case, arrays)
    output, lse, rows = cpu.attention_forward(problem)
    *gradients, _ = cpu.attention_backward(problem, arrays["grad_output"], output, rows)
    monkeypatch.undo()
    clean, clean_lse, rows = cpu.attention_forward(problem)
    *right, _ = cpu.attention_backward(problem, arrays["grad_output"], clean, rows)
    for one, other in zip((output, lse, *gradients), (clean, clean_lse, *right), strict=True):
        np.testing.assert_array_equal(one, other)
