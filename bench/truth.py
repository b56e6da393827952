"""The right answer, in float64, for as many rows as are cheap: every library is held to it before it is timed."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.cases import Job

ROWS = 48
TOLERANCE = {"float32": 2e-5, "float16": 4e-3}


def relative_error(job: Job, arrays: dict[str, Any], result: Any) -> float:
    """Largest error of a result over the largest right value; the result is a plain array."""
    if job.kind in ("attention", "training"):
        found, right = _attention(job, arrays, result)
    elif job.kind == "layer":
        found, right = _layer(job, arrays, result)
    else:
        left, right_operand = arrays["left"], arrays["right"]
        left = left.T if job.kind == "product_of_transposed_left" else left
        right_operand = right_operand.T if job.kind == "product_of_transposed_right" else right_operand
        found, right = result[:ROWS], left[:ROWS].astype("f8") @ right_operand.astype("f8")
    return float(np.abs(found.astype("f8") - right).max() / np.abs(right).max())


def _softmax(scores: Any) -> Any:
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _attention(job: Job, arrays: dict[str, Any], result: Any) -> tuple[Any, Any]:
    """The last rows of the last head: they see most under a causal mask."""
    case = job.attention
    q, k, v = (arrays[name][-1, -1].astype("f8") for name in ("query", "key", "value"))
    scores = q[-ROWS:] @ k.T * case.head_dim**-0.5
    if case.options.get("is_causal"):
        row = np.arange(case.queries)[-ROWS:, None]
        scores = np.where(np.arange(case.keys) <= row, scores, -np.inf)
    return result[-1, -1, -ROWS:], _softmax(scores) @ v


def _layer(job: Job, arrays: dict[str, Any], result: Any) -> tuple[Any, Any]:
    _, length, width, heads = job.sizes
    x, vector = arrays["x"][-1].astype("f8"), arrays["vector"].astype("f8")
    weights = vector[: 4 * width * width].reshape(4, width, width)
    biases = vector[4 * width * width :].reshape(4, width)
    q, k, v = ((x @ weights[i] + biases[i]).reshape(length, heads, -1).swapaxes(0, 1) for i in range(3))
    z = _softmax(q[:, -ROWS:] @ k.swapaxes(1, 2) * (width // heads) ** -0.5) @ v
    joined = z.swapaxes(0, 1).reshape(-1, width)
    return result[-1, -ROWS:], joined @ weights[3] + biases[3]
