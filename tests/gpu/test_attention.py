"""The attention kernels of the GPU against the error rule: devices x dtypes x cases of the table."""

from __future__ import annotations

from typing import Any

import bounds
import devices
import numpy as np
import pytest
from cases import BY_NAME, in_groups
from problems import on_device
from tolerance import DTYPES, assert_as_good_as_naive

from mha import gpu
from mha.problem import RowStatistics

NAMES = [case.name for case in in_groups("edge", "mask", "shape")]
ALL = [(name, dtype) for name in NAMES for dtype in DTYPES]
#: Neither queries nor keys missing: there is something to compare.
FULL = [(name, dtype) for name, dtype in ALL if not name.startswith("zero_")]


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_forward(name: str, dtype: str, device: devices.Device) -> None:
    problem, _, _, _, truth, naive = on_device(name, dtype, device)
    output, lse, _ = gpu.attention_forward(problem)
    assert_as_good_as_naive(device.get(output), naive.output, truth.output, "output")
    assert_as_good_as_naive(device.get(lse), naive.lse, truth.lse, "lse")


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_backward(name: str, dtype: str, device: devices.Device) -> None:
    problem, arrays, _, (host, on_host, _), truth, naive = on_device(name, dtype, device)
    output, lse, rows = gpu.attention_forward(problem)
    shape = (problem.batch, problem.heads, problem.queries, problem.keys)
    *gradients, scores = gpu.attention_backward(problem, arrays["grad_output"], output, rows, mask_shapes=[shape])
    slack = bounds.of_row_term(host, on_host["grad_output"]) if dtype in DTYPES else None
    check(device.get(gradients), naive, truth, slack, "from the statistics")
    if truth.scores.size:
        assert np.isfinite(device.get(scores[0])).all()
    *again, _ = gpu.attention_backward(problem, arrays["grad_output"], output, RowStatistics(lse))
    slack = bounds.of_row_term(host, on_host["grad_output"], lse=device.get(lse))
    check(device.get(again), naive, truth, slack, "from the log-sum-exp")


def check(found: Any, naive: Any, truth: Any, slack: Any, what: str) -> None:
    for name, one, close, right, allowed in zip("qkv", found, naive.gradients, truth.gradients, slack, strict=False):
        assert_as_good_as_naive(one, close, right, f"gradient of {name}, {what}", allowed)


@pytest.mark.parametrize("average", [False, True], ids=["per_head", "averaged"])
@pytest.mark.parametrize(("name", "dtype"), FULL)
def test_weights(name: str, dtype: str, average: bool, device: devices.Device) -> None:
    problem, _, _, _, truth, naive = on_device(name, dtype, device)
    _, _, rows = gpu.attention_forward(problem)
    right, close = truth.weights, naive.weights
    if average and BY_NAME[name].heads:
        right, close = right.mean(axis=-3), close.astype(problem.computing).mean(axis=-3).astype(problem.dtype)
    slack = np.finfo(problem.computing).eps * problem.head_dim**0.5 * right.max(initial=0) * (problem.queries == 1)
    weights = device.get(gpu.attention_weights(problem, rows, average))
    assert_as_good_as_naive(weights, close, right, "weights", slack)


@pytest.mark.parametrize("shape", ["full", "pairs", "keys", "rows_per_head"])
@pytest.mark.parametrize("name", ["size_33x65", "everything", "mask_float_4d", "grouped_4_2", "option_softcap",
                                  "lengths", "option_dropout", "causal_200x97"])  # fmt: skip
def test_mask_gradients(name: str, shape: str, device: devices.Device) -> None:
    problem, arrays, _, _, truth, naive = on_device(name, "float32", device)
    n, h, q, k = problem.batch, problem.heads, problem.queries, problem.keys
    target = {"full": (n, h, q, k), "pairs": (1, 1, q, k), "keys": (n, 1, 1, k), "rows_per_head": (1, h, q, k)}[shape]
    axes = tuple(i for i, size in enumerate(target) if size == 1)
    output, _, rows = gpu.attention_forward(problem)
    gradient = gpu.attention_backward(problem, arrays["grad_output"], output, rows, mask_shapes=[target])[3][0]
    close, right = (x.scores.sum(axis=axes, keepdims=True) for x in (naive, truth))
    assert_as_good_as_naive(device.get(gradient), close, right, "mask gradient", slack=1e-6 * len(axes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["size_33x65", "everything", "option_dropout", "grouped_4_2", "mask_bool_empty_rows",
                                  "option_softcap", "lengths", "grouped_8_2"])  # fmt: skip
def test_gradients_of_returned_weights(name: str, dtype: str, device: devices.Device) -> None:
    problem, arrays, grad_weights, (host, on_host, host_weights), truth, naive = on_device(name, dtype, device, True)
    output, _, rows = gpu.attention_forward(problem)
    *gradients, _ = gpu.attention_backward(problem, arrays["grad_output"], output, rows, grad_weights)
    slack = bounds.of_row_term(host, on_host["grad_output"], host_weights)
    check(device.get(gradients), naive, truth, slack, "with a gradient of the weights")
