"""Plans are pure functions within the kernels' limits, and what decides the bits does not depend on the threads."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from mha.cpu import plan
from mha.cpu.plan import AttentionPlan, Facts
from mha.problem import Sizes

THREADS = (1, 2, 3, 8, 64, 1000)
LANES = [(4, 4), (8, 4), (16, 4), (2, 8), (4, 8), (8, 8)]
SIZES = [Sizes(n, h, hk, queries, keys, d, dv)
         for n, (h, hk), queries, keys, (d, dv) in itertools.product(
             (1, 3), ((1, 1), (12, 4), (32, 1)), (1, 2, 9, 700, 32768), (0, 1, 65, 5000), ((1, 3), (64, 64), (256, 40)))
         ]  # fmt: skip


def plans_of(sizes: Sizes, facts: Facts) -> list[AttentionPlan]:
    rows = [plan.plan_rows(kernel, sizes, facts) for kernel in ("attention_weights", "attention_delta")]
    return [plan.plan_forward(sizes, facts), *plan.plan_backward(sizes, facts), *rows]


@pytest.mark.parametrize("lanes", LANES)
def test_plans_keep_within_what_the_kernels_hold(lanes: tuple[int, int]) -> None:
    for sizes, threads in itertools.product(SIZES, THREADS):
        for made in plans_of(sizes, Facts(*lanes, threads)):
            assert 1 <= made.threads <= threads, (sizes, made)
            assert 1 <= made.vectors <= (16 if made.kernel == "attention_decode" else 4), (sizes, made)
            assert 1 <= made.panels <= 4, (sizes, made)
            assert made.key_block >= 1, (sizes, made)
            assert 1 <= made.splits <= max(1, sizes.keys), (sizes, made)
            assert made.kernel != "attention_decode" or made.key_block >= sizes.queries


def test_equal_arguments_make_equal_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says in between."""
    first = [plans_of(sizes, Facts(16, 4, 3)) for sizes in SIZES]
    for variable, value in (("OMP_NUM_THREADS", "7"), ("MHA_CPU_ISA", "baseline"), ("MHA_BACKEND", "reference")):
        monkeypatch.setenv(variable, value)
    assert [plans_of(dataclasses.replace(sizes), Facts(16, 4, 3)) for sizes in SIZES] == first


def deciding(made: list[AttentionPlan], lanes: int) -> list[Any]:
    """What the order of a row's sums depends on; panels and threads share out rows."""
    blocks = {p.key_block for p in made if p.kernel == "attention_backward_query"}
    assert blocks <= {p.vectors * lanes for p in made if p.kernel == "attention_backward"}, "other sums than the fused"
    return [(p.kernel, p.vectors, p.key_block, p.splits) for p in made if p.kernel != "attention_backward_query"]


@pytest.mark.parametrize("lanes", LANES)
def test_threads_do_not_decide_sums(lanes: tuple[int, int]) -> None:
    for sizes in SIZES:
        made = [deciding(plans_of(sizes, Facts(*lanes, threads)), lanes[0]) for threads in THREADS]
        assert all(one == made[0] for one in made), sizes


@pytest.mark.parametrize("lanes", LANES)
def test_products(lanes: tuple[int, int]) -> None:
    """The sums of a product run over blocks of k, which no number of threads may change."""
    for m, n, k, lies in itertools.product((1, 24, 25, 500), (1, 16, 65, 3000), (0, 1, 64, 513), (True, False)):
        made = [plan.plan_product(m, n, k, lies, Facts(*lanes, threads)) for threads in THREADS]
        assert len({(p.vectors, p.k_block, p.in_place) for p in made}) == 1, (m, n, k)
        for p, threads in zip(made, THREADS, strict=True):
            assert 1 <= p.threads <= threads
            assert 1 <= p.panels <= 4
            assert p.row_block == m or p.row_block % 32 == 0, "rows beside the tiles of AMX are summed in another order"
            assert 1 <= p.vectors <= 4
            assert p.in_place <= lies


def test_the_scratch_of_the_fused_backward_is_bounded_for_every_size() -> None:
    for sizes, threads, (lanes, itemsize) in itertools.product(SIZES, THREADS, LANES):
        keys = plan.plan_backward(sizes, Facts(lanes, itemsize, threads))[0]
        if keys.fused:
            columns = -(-sizes.head_dim // lanes) * lanes
            assert keys.threads * sizes.rows * columns * itemsize <= plan._FUSED_BYTES, sizes


def test_a_team_is_never_larger_than_its_work() -> None:
    """Idle threads would be woken for nothing."""
    few = Sizes(1, 2, 2, 9, 100_000, 64, 64)
    for made in (plan.plan_forward(few, Facts(16, 4, 64)), *plan.plan_backward(few, Facts(16, 4, 64))):
        limit = {"attention_forward": 2, "attention_backward": 2 * -(-100_000 // 64), "attention_backward_query": 2}
        assert made.threads <= limit[made.kernel], made
