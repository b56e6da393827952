"""Plans are pure, levels can be forced, and limits on threads are obeyed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

import mha
from mha.cpu import launch, load, plan, threads
from mha.problem import Sizes

BIG = Sizes(4, 12, 12, 512, 512, 64, 64)
FACTS = plan.Facts(lanes=16, itemsize=4, threads=2)


def test_few_rows_are_decoded_with_keys_split_by_the_problem_alone() -> None:
    sizes = Sizes(1, 32, 8, 1, 4096, 128, 128)
    plans = [plan.plan_forward(sizes, plan.Facts(16, 4, n)) for n in (1, 2, 64)]
    assert {p.kernel for p in plans} == {"attention_decode"}
    assert len({p.splits for p in plans}) == 1
    assert plans[0].splits > 1


def test_small_work_stays_on_the_calling_thread() -> None:
    small = Sizes(1, 2, 2, 16, 16, 32, 32)
    assert plan.plan_forward(small, FACTS).threads == 1
    assert plan.plan_forward(BIG, FACTS).threads == 2
    assert plan.plan_product(16, 64, 64, True, FACTS).threads == 1


def test_the_backward_is_fused_where_heads_suffice() -> None:
    assert [p.fused for p in plan.plan_backward(BIG, FACTS)] == [True]
    one_head = Sizes(1, 1, 1, 32768, 32768, 64, 64)
    separate = plan.plan_backward(one_head, FACTS)
    assert [p.kernel for p in separate] == ["attention_backward", "attention_backward_query"]
    assert not separate[0].fused
    assert plan.plan_backward(one_head, FACTS)[0].why


def test_scratch_of_the_fused_backward_is_bounded() -> None:
    long = Sizes(8, 16, 16, 65536, 65536, 128, 128)
    assert not plan.plan_backward(long, FACTS)[0].fused


def scratch_of(calls: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of a thread, by kernel."""
    needs: dict[str, int] = {}
    original = launch.Launch.run

    def recording(self: launch.Launch, kernel: str, threads: int) -> int:
        needs[kernel] = getattr(self.kernels, f"{kernel}_scratch")(self.packed(), self.double)
        return original(self, kernel, threads)

    monkeypatch.setattr(launch.Launch, "run", recording)
    calls()
    return needs


def documented(itemsize: int, width: int, vector_bytes: int, converted: bool = False) -> tuple[int, int]:
    """README, "Memory": W, and the forward's bytes a thread."""
    lanes, panels, keys = {64: 64, 32: 24, 16: 16}[vector_bytes] * 4 // itemsize, 3 if vector_bytes == 32 else 2, 64
    if width > 96 and vector_bytes == 64:
        keys = 128
        if itemsize == 8:
            lanes, panels = 24, 3
    if converted:
        panels = 4
    return lanes, itemsize * (panels * lanes * 2 * width + keys * (2 * lanes + 2 * width))


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("level", load.runnable_levels())
def test_scratch_of_the_forward_follows_the_documented_formula(
    level: str, dtype: Any, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MHA_CPU_ISA", level)
    q = np.zeros((1, 8, 1100, width), dtype)
    needs = scratch_of(lambda: mha.scaled_dot_product_attention(q, q, q), monkeypatch)["attention_forward"]
    itemsize, half = max(q.itemsize, 4), dtype == np.float16
    stated = documented(itemsize, width, load.kernels(level).VECTOR_BYTES, half)[1]
    assert 0.95 * stated <= needs <= 1.15 * stated


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("level", load.runnable_levels())
def test_scratch_of_the_backward_follows_the_documented_formula(
    level: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The panels' index arrays are the small rest."""
    monkeypatch.setenv("MHA_CPU_ISA", level)
    heads, length, width = (8, 1024, 64) if fused else (1, 4096, 64)
    q = np.zeros((1, heads, length, width), np.float32)

    def calls() -> None:
        output, lse = mha.scaled_dot_product_attention(q, q, q, return_lse=True)
        mha.scaled_dot_product_attention_backward(q, q, q, q, output, lse)

    needs = scratch_of(calls, monkeypatch)
    assert ("attention_backward_query" not in needs) == fused
    lanes = documented(4, width, load.kernels(level).VECTOR_BYTES)[0]
    stated = 4 * (lanes * 5 * width + 64 * (2 * lanes + 2 * width)) + (4 * length * width if fused else 0)
    assert 0.95 * stated <= needs["attention_backward"] <= 1.2 * stated + 16 * length


@pytest.mark.parametrize("m", [1, 8, 24, 25, 4096])
def test_products_of_few_rows_use_the_matrix_where_it_lies(m: int) -> None:
    assert plan.plan_product(m, 768, 768, True, FACTS).in_place == (m <= 24)
    assert not plan.plan_product(m, 768, 768, False, FACTS).in_place


def test_a_level_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for level in load.runnable_levels():
        monkeypatch.setenv("MHA_CPU_ISA", level)
        assert load.chosen_level() == level
    monkeypatch.delenv("MHA_CPU_ISA")
    assert load.chosen_level() == load.runnable_levels()[0]


def test_an_unknown_level_is_an_error_that_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHA_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match=r"sse9.*baseline"):
        load.chosen_level()


def test_threads_are_taken_literally() -> None:
    try:
        mha.set_num_threads(7)
        expected = 7 if load.runtime().OPENMP else 1
        assert mha.get_num_threads() in (7, expected)
    finally:
        mha.set_num_threads(None)
    assert 1 <= mha.get_num_threads() <= threads.usable_cpus()


@pytest.mark.parametrize(("bad", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_bad_thread_counts(bad: float, error: type[Exception]) -> None:
    with pytest.raises(error):
        mha.set_num_threads(bad)  # type: ignore[arg-type]


@pytest.mark.skipif(not load.runtime().OPENMP, reason="a serial build: compiled without OpenMP")
def test_a_threadpoolctl_limit_holds_on_its_thread() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    try:
        with threadpoolctl.threadpool_limits(1, user_api="openmp"):
            assert mha.get_num_threads() == 1
            mha.set_num_threads(8)
            assert mha.get_num_threads() == 1
            elsewhere = []
            worker = threading.Thread(target=lambda: elsewhere.append(mha.get_num_threads()))
            worker.start()
            worker.join()
            assert elsewhere == [8]
        assert mha.get_num_threads() == 8
    finally:
        mha.set_num_threads(None)


@pytest.mark.parametrize(
    ("variable", "value", "expected"), [("OMP_NUM_THREADS", "1", "1"), ("OMP_NUM_THREADS", "64", None)]
)
def test_the_environment_is_obeyed_up_to_the_processors(variable: str, value: str, expected: str | None) -> None:
    code = "import mha; print(mha.get_num_threads())"
    environment = os.environ | {variable: value}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == (expected or str(threads.usable_cpus()))


@pytest.mark.parametrize("mine", [None, "77"])
def test_loading_leaves_the_environment_alone(mine: str | None) -> None:
    code = "import os, mha; mha.get_num_threads(); print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    if mine:
        environment["GOMP_SPINCOUNT"] = mine
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str(mine)
