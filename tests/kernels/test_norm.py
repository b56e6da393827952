"""Dropout, residual link and layer norm: the bits of the reference without a norm, its accuracy with one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tolerance import DTYPES, TRUTH, assert_as_good_as_naive

import mha
from mha import cpu, reference, reference_backend
from mha.problem import COMPUTING, Dropout, Norm
from mha.random import DropoutState

STATE = DropoutState(2**63 + 5, 7)
SHAPES = [(1, 1, 1), (3, 5, 29), (2, 70, 64), (1, 33, 300), (0, 5, 8), (2, 0, 8)]


def normal(*shape: int, dtype: Any, salt: int = 0) -> Any:
    return np.random.default_rng([salt, *shape]).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_norm_it_is_the_references_bits(dtype: str, p: float, level: str) -> None:
    x, residual = (normal(3, 5, 29, dtype=DTYPES[dtype], salt=i) for i in range(2))
    for kept in (None, 1.0, 0.7):
        dropout = Dropout(p, STATE, kept=kept)
        wide = x.astype(COMPUTING[x.dtype])
        dropped = reference.output_dropout(wide, p, STATE, scale=kept)
        output, total = cpu.residual_norm(x, dropout)
        assert total is output
        np.testing.assert_array_equal(output, dropped.astype(x.dtype))
        both = (dropped + residual.astype(dropped.dtype)).astype(x.dtype)
        np.testing.assert_array_equal(cpu.residual_norm(x, dropout, residual)[0], both)


def norms(features: int, dtype: Any) -> list[Norm]:
    scale, bias = (normal(features, dtype=dtype, salt=i) for i in (5, 6))
    return [Norm(None, None, 1e-5), Norm(scale, None, 0.5), Norm(None, bias, 1e-5), Norm(scale, bias, 1e-3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_as_good_as_naive(dtype: str, shape: tuple[int, ...], level: str) -> None:
    kind = DTYPES[dtype]
    x, residual, up = (normal(*shape, dtype=kind, salt=i) for i in range(3))
    for norm in norms(shape[2], np.float32 if dtype == "float16" else kind):
        for dropout, link in ((None, None), (Dropout(0.3, STATE), residual)):
            output, total = cpu.residual_norm(x, dropout, link, norm)
            naive, naive_total = reference_backend.residual_norm(x, dropout, link, norm)
            np.testing.assert_array_equal(total, naive_total)
            summed = reference.output_dropout(x.astype(TRUTH), dropout.p, STATE) if dropout else x.astype(TRUTH)
            truth = reference.layer_norm(summed + (0 if link is None else link.astype(TRUTH)), norm)
            assert_as_good_as_naive(output, naive, truth, "output")
            found = cpu.residual_norm_backward(up, total, norm, dropout)
            close = reference_backend.residual_norm_backward(up, total, norm, dropout)
            right = reference.layer_norm_backward(up.astype(TRUTH), total.astype(TRUTH), norm)
            assert_as_good_as_naive(found[0], close[0], right[0], "gradient of total")
            for i, name in ((2, "scale"), (3, "bias")):
                # Sums over rows that cancel: the rule's ulp are those of the terms.
                slack = (
                    4 * np.finfo(found[i].dtype).eps * float(np.abs(up.astype(TRUTH)).sum(axis=(0, 1)).max(initial=0))
                )
                assert_as_good_as_naive(found[i], close[i], right[i - 1], f"gradient of {name}", slack)
            if dropout is None:
                assert found[1] is found[0]
            else:
                kept = reference.output_dropout(np.ones_like(found[0]), 0.3, STATE) != 0
                assert (found[1][~kept] == 0).all()
                np.testing.assert_allclose(
                    found[1][kept].astype(float),
                    found[0][kept].astype(float) / 0.7,
                    rtol=2e-2 if x.itemsize < 4 else 1e-6,
                )


def test_a_large_mean_is_taken_away_exactly(level: str) -> None:
    """One pass, E[x^2] - E[x]^2, would lose the spread of 1 below a mean of 10 000 in float32."""
    spread = normal(2, 8, 768, dtype=np.float32)
    x = spread + np.float32(1e4)
    truth = reference.layer_norm(x.astype(TRUTH), Norm(None, None, 0.0))
    found, _ = cpu.residual_norm(x, norm=Norm(None, None, 0.0))
    assert np.abs(found - truth).max() < 2e-6
    assert np.abs(reference.layer_norm(x, Norm(None, None, 0.0)) - truth).max() < 2e-6


def test_a_constant_row_gives_the_bias(level: str) -> None:
    x = np.full((1, 2, 40), 3.25, np.float32)
    bias = normal(40, dtype=np.float32)
    output, total = cpu.residual_norm(x, norm=Norm(None, bias, 1e-5))
    np.testing.assert_array_equal(output, np.broadcast_to(bias, x.shape))
    gradient = cpu.residual_norm_backward(np.ones_like(x), total, Norm(None, bias, 1e-5))[0]
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(2, 900, 96), (1, 3, 40_000)])
def test_the_same_bits_for_any_number_of_threads(shape: tuple[int, ...], level: str) -> None:
    x, residual, up = (normal(*shape, dtype=np.float32, salt=i) for i in range(3))
    norm, dropout = norms(shape[2], np.float32)[3], Dropout(0.25, STATE)
    results = []
    try:
        for threads in (1, 2, 3, 8):
            mha.set_num_threads(threads)
            output, total = cpu.residual_norm(x, dropout, residual, norm)
            results.append(
                [a.tobytes() for a in (output, total, *cpu.residual_norm_backward(up, total, norm, dropout))]
            )
    finally:
        mha.set_num_threads(None)
    assert all(one == results[0] for one in results)


def test_views_and_other_memory_orders(level: str) -> None:
    x = normal(5, 3, 58, dtype=np.float32).swapaxes(0, 1)[:, :, ::2]
    norm = norms(29, np.float32)[3]
    for one, other in zip(
        cpu.residual_norm(x, None, x, norm), cpu.residual_norm(x.copy(), None, x.copy(), norm), strict=True
    ):
        np.testing.assert_array_equal(one, other)
