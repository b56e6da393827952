"""Poison anywhere, every kind of mask: whatever is finite in the reference is finite, and the same, in the kernels.

The reference leaves hidden pairs out of every sum, one by one. Poisoned are a key, a value, a query, an output
gradient or the gradient of the returned weights; also where rows have no key and keys have no row. Dropped elements
are not protected, so there is no dropout here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME, in_groups
from shared import problem_of

import mha
from mha import cpu, reference
from mha.cpu import load
from mha.problem import AttentionProblem

NAMES = [case.name for case in in_groups("edge", "mask", "shape")
         if (case.mask or case.lengths or case.options or case.name.startswith("grouped"))
         and not case.options.get("dropout_p")]  # fmt: skip
TOLERANCE = {np.float32: 2e-3, np.float16: 6e-2}


@pytest.fixture(autouse=True)
def always_parallel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("mha.cpu.plan._SMALL_WORK", 0)
    yield
    mha.set_num_threads(None)


def from_kernels(p: AttentionProblem, grad: Any, grad_weights: Any) -> dict[str, Any]:
    output, lse, rows = cpu.attention_forward(p)
    pairs = (p.batch, p.heads, p.queries, p.keys)
    *gradients, scores = cpu.attention_backward(p, grad, output, rows, grad_weights, mask_shapes=[pairs])
    weights = cpu.attention_weights(p, rows, False)
    return named(output, lse, weights, *gradients, scores[0].reshape(weights.shape))


def from_reference(p: AttentionProblem, grad: Any, grad_weights: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"scale": p.scale, "softcap": p.softcap}
    inputs = p.query, p.key, p.value, p.mask
    results = reference.attention_forward(*inputs, **options)
    with np.errstate(all="ignore"):
        return named(*results, *reference.attention_backward(grad, *inputs, grad_weights=grad_weights, **options))


def named(*results: Any) -> dict[str, Any]:
    names = ("output", "lse", "weights", "query", "key", "value", "scores")
    return dict(zip(names, (x.astype(np.float64) for x in results), strict=True))


def poisoned(name: str, dtype: Any, where: str, poison: float) -> tuple[AttentionProblem, Any, Any]:
    """One position in the middle; with lengths also everything that no sample has."""
    case = BY_NAME[name]
    arrays = {k: np.array(x) for k, x in case.inputs(dtype).items()}
    rng = np.random.default_rng(4)
    key, row = int(rng.integers(case.keys)), int(rng.integers(case.queries))
    for each, index in (("key", key), ("value", key), ("query", row), ("grad_output", row)):
        if each in where.split("+"):
            arrays[each][..., index, :] = poison
            for n, length in enumerate(arrays.get("query_lengths" if index == row else "key_lengths", ())):
                arrays[each][n, :, length:] = poison
    problem = problem_of(case, arrays)
    grad_weights = None
    if where == "grad_weights":
        grad_weights = rng.standard_normal((*problem.batch_shape, case.heads, case.queries, case.keys)).astype(dtype)
        grad_weights[..., key] = poison
    return problem, arrays["grad_output"], grad_weights


@pytest.mark.parametrize("where", ["key+value", "query", "grad_output", "query+grad_output", "grad_weights"])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_reference_keeps_finite_is_finite(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, poison in ((np.float32, np.nan), (np.float32, np.inf), (np.float16, np.nan)):
        problem, grad, grad_weights = poisoned(name, dtype, where, poison)
        right = from_reference(problem, grad, grad_weights)
        levels = load.runnable_levels() if dtype == np.float32 else load.runnable_levels()[:1]
        for level in levels:
            monkeypatch.setenv("MHA_CPU_ISA", level)
            for threads in (1, 8):
                mha.set_num_threads(threads)
                found = from_kernels(problem, grad, grad_weights)
                for which, truth in right.items():
                    clean = np.isfinite(truth)
                    np.testing.assert_allclose(
                        found[which][clean], truth[clean], TOLERANCE[dtype], TOLERANCE[dtype],
                        err_msg=f"{which}, {level}, {np.dtype(dtype)}, {poison}, {threads} threads",
                    )  # fmt: skip


def test_the_poison_arrives_where_it_is_seen() -> None:
    """Else the test above would compare nothing."""
    for where, lost in (("key+value", "output"), ("query", "output"), ("grad_output", "query"), ("query", "key")):
        problem, grad, _ = poisoned("causal_64x64", np.float32, where, np.nan)
        found = from_reference(problem, grad, None)
        assert np.isnan(found[lost]).any(), (where, lost)
        assert np.isfinite(found[lost]).any(), (where, lost)
