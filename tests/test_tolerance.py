"""The error rule itself: it lets rounding pass and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from tolerance import TRUTH, assert_as_good_as_naive

truth = np.random.default_rng(0).standard_normal((5, 8)).astype(TRUTH)
naive = truth.astype(np.float32)


def test_rounding_passes() -> None:
    assert_as_good_as_naive(naive * np.float32(1 + 1e-7), naive, truth)
    assert_as_good_as_naive(naive[:0], naive[:0], truth[:0])


@pytest.mark.parametrize("wrong", [1e-5, -1e-5, np.nan, np.inf, 3.0])
def test_an_error_fails(wrong: float) -> None:
    found = naive.copy()
    found[3, 2] += np.float32(wrong)
    with pytest.raises(AssertionError):
        assert_as_good_as_naive(found, naive, truth)


def test_a_small_row_is_held_to_its_own_scale() -> None:
    small = truth.copy()
    small[1] *= 1e-6
    close = small.astype(np.float32)
    found = close.copy()
    found[1, 0] += np.float32(1e-7)
    exact = small.astype(np.float32).astype(TRUTH)  # a naive implementation without error
    with pytest.raises(AssertionError):
        assert_as_good_as_naive(found, close, exact)


def test_shape_dtype_and_infinities_count() -> None:
    with pytest.raises(AssertionError):
        assert_as_good_as_naive(naive[:4], naive, truth)
    with pytest.raises(AssertionError):
        assert_as_good_as_naive(naive.astype(np.float64), naive, truth)
    empty = truth.copy()
    empty[0, 0] = -np.inf
    with pytest.raises(AssertionError):
        assert_as_good_as_naive(naive, empty.astype(np.float32), empty)
