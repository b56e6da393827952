"""The bound on the gradients rejects what a broken kernel would give."""

from __future__ import annotations

from typing import Any

import bounds
import numpy as np
import pytest
from shared import prepared
from tolerance import DTYPES, assert_as_good_as_naive

from mha import reference

NAMES = ("size_33x65", "causal_97x200", "mask_float_4d", "grouped_6_1", "dims_80_100", "lengths", "option_dropout")


def accepted(found: Any, naive: Any, truth: Any, slack: Any) -> bool:
    try:
        assert_as_good_as_naive(found, naive, truth, "", slack)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["zero", "too_large", "one_row", "no_row_term", "key_off_by_one"])
def test_planted_faults_are_found(name: str, dtype: str, fault: str) -> None:
    problem, arrays, _, truth, naive = prepared(name, dtype)
    slack = bounds.of_row_term(problem, arrays["grad_output"])
    for which in (0, 1):
        right = naive.gradients[which]
        found = right.copy()
        if fault == "zero":
            found[...] = 0
        elif fault == "too_large":
            found = (found.astype(np.float64) * 1.1).astype(found.dtype)
        elif fault == "one_row":
            row = np.unravel_index(np.abs(found.astype(np.float64)).argmax(), found.shape)[:-1]
            found[row] = 0
        elif fault == "no_row_term":
            found = without_row_term(problem, arrays["grad_output"])[which].astype(found.dtype)
        else:
            found = np.roll(found, 1, axis=-2)
        assert accepted(right, right, truth.gradients[which], slack[which])
        assert not accepted(found, right, truth.gradients[which], slack[which]), which


def without_row_term(problem: Any, grad_output: Any) -> tuple[Any, Any]:
    """What a kernel that forgets to subtract rowsum(dO * O) would return."""
    p, options = problem, {"scale": problem.scale}
    if p.dropout is not None:
        options |= {"dropout_p": p.dropout.p, "dropout_state": p.dropout.state}
    q, k, v = (x.astype(np.float64) for x in (p.query, p.key, p.value))
    dropped = reference.attention_forward(q, k, v, p.mask, **options)[2]
    group = p.heads // p.kv_heads
    scores = dropped * (grad_output.astype(np.float64) @ np.repeat(v, group, -3).swapaxes(-1, -2)) * p.scale
    of_key = scores.swapaxes(-1, -2) @ q
    of_key = of_key.reshape(*of_key.shape[:-3], p.kv_heads, group, *of_key.shape[-2:]).sum(axis=-3)
    return scores @ np.repeat(k, group, -3), of_key


def test_nothing_is_allowed_where_no_error_can_reach() -> None:
    problem, arrays, *_ = prepared("causal_5x129", "float16")
    slack = bounds.of_row_term(problem, arrays["grad_output"])
    assert (slack.key[..., 5:, :] == 0).all()
    assert (slack.value == 0).all()
