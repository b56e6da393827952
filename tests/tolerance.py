"""The error rule: at most twice the error of a naive implementation at the same precision, and four ulp.

Truth is the reference in extended precision; naive is the reference in the computing dtype, its result rounded to the
stored one. The naive error is the largest of the array; the four ulp are those of the largest value in the row (the
last axis of the truth), so that a row of small values is held to its own scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mha import optional

TRUTH = np.longdouble

DTYPES: dict[str, Any] = {"float32": np.float32, "float64": np.float64, "float16": np.float16}
if optional.bfloat16 is not None:
    DTYPES["bfloat16"] = optional.bfloat16


def spacing(dtype: Any) -> float:
    """Relative distance of neighbouring values."""
    return 2.0**-7 if np.dtype(dtype).name == "bfloat16" else float(np.finfo(dtype).eps)


def assert_as_good_as_naive(found: Any, naive: Any, truth: Any, name: str = "", slack: float = 0.0) -> None:
    """Raise AssertionError naming the worst element unless the rule holds; `slack` is absolute.

    Shapes and dtypes must agree, infinities must lie in the same places, and there must be no NaN.
    """
    assert found.shape == truth.shape == naive.shape, (name, found.shape, naive.shape, truth.shape)
    assert found.dtype == naive.dtype, (name, found.dtype, naive.dtype)
    found, rounded, truth = (x.astype(TRUTH) for x in (found, naive, truth))
    assert not np.isnan(found).any(), f"{name}: NaN"
    infinite = np.isinf(truth)
    assert (found[infinite] == truth[infinite]).all(), f"{name}: infinities differ"
    found, rounded, truth = (np.where(infinite, 0, x) for x in (found, rounded, truth))
    if not truth.size:
        return
    row = np.abs(truth).max(axis=-1, keepdims=True)
    allowed = 2 * np.abs(rounded - truth).max() + 4 * TRUTH(spacing(naive.dtype)) * row + TRUTH(slack)
    error = np.abs(found - truth)
    over = error > allowed
    if over.any():
        where = np.unravel_index(np.argmax(error - allowed), error.shape)
        limit = np.broadcast_to(allowed, error.shape)[where]
        raise AssertionError(
            f"{name}: {int(over.sum())} of {over.size} values off; at {tuple(map(int, where))} {found[where]} where "
            f"{truth[where]} is right: error {error[where]:.3g}, allowed {limit:.3g}"
        )
