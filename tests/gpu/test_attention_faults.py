"""Faults planted in the attention kernels, one at least in each: the error rule sees every one of them."""

from __future__ import annotations

from collections.abc import Callable

import bounds
import devices
import emulator
import pytest
from problems import on_device
from test_faults import assert_seen
from tolerance import assert_as_good_as_naive

from mha import gpu
from mha.gpu import plan


def forward(name: str, dtype: str) -> None:
    """Output and log-sum-exp keep the error rule."""
    problem, _, _, _, truth, naive = on_device(name, dtype, devices.get("emulated"))
    output, lse, _ = gpu.attention_forward(problem)
    assert_as_good_as_naive(devices.get("emulated").get(output), naive.output, truth.output)
    assert_as_good_as_naive(devices.get("emulated").get(lse), naive.lse, truth.lse)


def backward(name: str, dtype: str) -> None:
    """The gradients do."""
    device = devices.get("emulated")
    problem, arrays, _, (host, on_host, _), truth, naive = on_device(name, dtype, device)
    output, _, rows = gpu.attention_forward(problem)
    *gradients, _ = gpu.attention_backward(problem, arrays["grad_output"], output, rows)
    slack = bounds.of_row_term(host, on_host["grad_output"])
    for found, close, right, allowed in zip(gradients, naive.gradients, truth.gradients, slack, strict=True):
        assert_as_good_as_naive(device.get(found), close, right, "", allowed)


def weights(average: bool) -> Callable[[str, str], None]:
    """The weights do."""

    def check(name: str, dtype: str) -> None:
        problem, _, _, _, truth, naive = on_device(name, dtype, devices.get("emulated"))
        _, _, rows = gpu.attention_forward(problem)
        right, close = truth.weights, naive.weights
        if average:
            right, close = right.mean(axis=-3), close.mean(axis=-3)
        assert_as_good_as_naive(
            devices.get("emulated").get(gpu.attention_weights(problem, rows, average)), close, right
        )

    return check


def other_weights(name: str, dtype: str) -> None:
    """The gradients with one of the weights, and of a mask, from a log-sum-exp."""
    device = devices.get("emulated")
    problem, arrays, grad_weights, (host, on_host, of_weights), truth, naive = on_device(name, dtype, device, True)
    output, lse, _ = gpu.attention_forward(problem)
    target = (1, 1, problem.queries, problem.keys)
    *gradients, masks = gpu.attention_backward(
        problem, arrays["grad_output"], output, gpu.RowStatistics(lse), grad_weights, mask_shapes=[target]
    )
    slack = bounds.of_row_term(host, on_host["grad_output"], of_weights, lse=device.get(lse))
    for found, close, right, allowed in zip(gradients, naive.gradients, truth.gradients, slack, strict=True):
        assert_as_good_as_naive(device.get(found), close, right, "", allowed)
    close, right = (x.scores.sum(axis=(0, 1), keepdims=True) for x in (naive, truth))
    assert_as_good_as_naive(device.get(masks[0]), close, right, slack=2e-6)


@pytest.mark.parametrize(
    ("check", "name", "dtype", "file", "fault"),
    [
        (
            forward,
            "size_97x200",
            "float32",
            "attention_forward.cu",
            ("maximum[m][h], all);", "maximum[m][h], 2 * all);"),
        ),
        (forward, "size_97x200", "float16", "attention_forward.cu", ("load_keys(next);", "load_keys(j);")),
        (forward, "causal_97x200", "float32", "mask.cuh", ("hi = position + p.right + 1;", "hi = position + p.right;")),
        (forward, "option_dropout", "float64", "mask.cuh", (">> (k & 7) & 1 ? x[m]", ">> (k & 3) & 1 ? x[m]")),
        (forward, "mask_float_inf", "float32", "mask.cuh", ("b == none || s == none ? none", "s == none ? none")),
        (forward, "mask_float_4d", "float32", "mask.cuh", ("? lowest(s) : s + b", "? lowest(s) : s")),
        (forward, "size_33x65", "float64", "tile_tensor.cuh", ("mma_float64(c[2], c[3], a.x[3], b.x[1]);", "")),
        (
            forward,
            "size_33x65",
            "float16",
            "tile_tensor.cuh",
            ("pack_two(p[m][k][2], p[m][k][3])", "pack_two(p[m][k][3], p[m][k][2])"),
        ),
        (forward, "size_33x65", "float32", "tile_plain.cuh", ("x[m][j][2 * h + e] += a", "x[m][j][2 * e + h] += a")),
        (
            forward,
            "decode_1x1000",
            "float32",
            "attention_decode.cu",
            ("split * all / p.splits", "split * all / p.splits + 1"),
        ),
        (
            forward,
            "decode_1x1000",
            "float32",
            "attention_decode.cu",
            ("exponential(maxima[split * size] - base);\n    const", "1;\n    const"),
        ),
        (forward, "size_97x200", "bfloat16", "online_softmax.cuh", ("out[m][j][2 * h + e] *= factor;", ";")),
        (backward, "dims_128_40", "float32", "attention_delta.cu", ("c += 32", "c += 64")),
        (
            backward,
            "size_97x200",
            "float16",
            "attention_backward.cu",
            ("x = softmax_gradient(", "x = weights[m][c][2 * h + e] * ("),
        ),
        (
            backward,
            "grouped_4_2",
            "float32",
            "attention_backward.cu",
            ("kv_head * group + t / tiles", "kv_head * group"),
        ),
        (
            backward,
            "size_97x200",
            "float32",
            "attention_backward_query.cu",
            ("score_gradients(statistics, weights, grad);", ""),
        ),
        (
            backward,
            "option_softcap",
            "float64",
            "query_rows.cuh",
            ("softcap_gradient(grad[m][c][i], slope[m][c][i])", "grad[m][c][i]"),
        ),
        (
            backward,
            "option_dropout",
            "float32",
            "attention_backward.cu",
            ("drop_query_scores(p, n, head, i, first + first_row, grad, draws);", ""),
        ),
        (backward, "causal_200x97", "float32", "key_panel.cuh", ("j >= low", "j > low")),
        (
            weights(False),
            "causal_33x65",
            "float32",
            "attention_weights.cu",
            ("target_sample, target_head, first + r)", "target_sample, target_head, first + r / 2)"),
        ),
        (weights(True), "size_33x65", "float32", "attention_weights.cu", ("1 / (Real)p.heads", "(Real)1")),
        (other_weights, "size_33x65", "float32", "attention_weights.cu", ("((Real *)p.delta)[row] += all;", ";")),
        (other_weights, "size_33x65", "float32", "attention_weights.cu", ("all != 0 ? 1 / all : 0", "1")),
        (
            other_weights,
            "size_33x65",
            "float32",
            "attention_weights.cu",
            ("n < (all_samples ? p.batch", "n < (all_samples ? 1"),
        ),
    ],
)
def test_is_seen(
    check: Callable[[str, str], None], name: str, dtype: str, file: str, fault: tuple[str, str],
    emulated: emulator.runtime.Emulated,
) -> None:  # fmt: skip
    def right() -> bool:
        try:
            check(name, dtype)
        except AssertionError:
            return False
        return True

    assert_seen(right, file, fault, emulated)


def test_a_wrong_amount_of_shared_memory_does_not_compile(
    emulated: emulator.runtime.Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plan.SHARED, "attention_forward", lambda tiles, traits: 1024)
    plan.plan_forward.cache_clear()
    with pytest.raises(RuntimeError, match="another amount of shared memory"):
        forward("size_64x64", "float64")
    plan.plan_forward.cache_clear()
