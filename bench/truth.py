"""The right answer, in float64, for as many rows as are cheap: every library is held to it before it is timed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bench.cases import ATTENTION, LAYER, WINDOW, Job

ROWS = 48
#: Largest error over the largest right value.
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2, "float64": 1e-13}


class Errors(NamedTuple):
    """Relative to the largest right value, and in the mean square to the mean square."""

    largest: float
    rms: float


def errors(job: Job, arrays: dict[str, Any], results: tuple[Any, ...]) -> Errors:
    """Of the results as plain arrays: one, or for training jobs output and gradient of the query or the input."""
    pairs = _pairs(job, arrays, results)
    found = [np.asarray(x, np.float64) for x, _ in pairs]
    largest = max(float(np.abs(x - y).max() / np.abs(y).max()) for x, (_, y) in zip(found, pairs, strict=True))
    x, y = found[0], pairs[0][1]
    return Errors(largest, float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))))


def _pairs(job: Job, arrays: dict[str, Any], results: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    if job.kind in ATTENTION:
        return _attention(job, arrays, results)
    if job.kind in LAYER:
        return _layer(job, arrays, results)
    left, right = (arrays[name].astype("f8") for name in ("left", "right"))
    left = left.T if job.transposed == "left" else left
    right = right.T if job.transposed == "right" else right
    return [(results[0][:ROWS], left[:ROWS] @ right)]


def _softmax(scores: Any) -> Any:
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _attention(job: Job, arrays: dict[str, Any], results: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """The last rows of the last head: they see most under a causal mask."""
    queries, keys, d = job.sizes[3:]
    q, k, v, g = (arrays[name][-1, -1].astype("f8") for name in ("query", "key", "value", "grad"))
    q, g = q[-ROWS:], g[-ROWS:]
    scores = q @ k.T * d**-0.5
    row, column = np.arange(queries)[-ROWS:, None], np.arange(keys)
    if job.causal or job.mask == "window":
        scores = np.where(column <= row, scores, -np.inf)
    if job.mask == "window":
        scores = np.where(column >= row - WINDOW, scores, -np.inf)
    if job.mask == "padding":
        scores = np.where(arrays["attn_mask"][-1, 0], scores, -np.inf)
    if job.mask == "bias":
        scores = scores + arrays["attn_mask"][-1, -1, -ROWS:]
    p = _softmax(scores)
    output, of_scores = p @ v, g @ v.T
    gradient = p * (of_scores - (g * output).sum(-1, keepdims=True)) @ k * d**-0.5
    rights = (output, gradient)
    return [(x[-1, -1, -ROWS:], right) for x, right in zip(results, rights, strict=False)]


def _layer(job: Job, arrays: dict[str, Any], results: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """The last sample; the gradient of its input, which is query, key and value at once."""
    _, length, width, heads = job.sizes
    x, vector, grad = arrays["x"][-1].astype("f8"), arrays["vector"].astype("f8"), arrays["grad"][-1].astype("f8")
    weights = vector[: 4 * width * width].reshape(4, width, width)
    biases = vector[4 * width * width :].reshape(4, width)

    def split(rows: Any) -> Any:
        return rows.reshape(length, heads, -1).swapaxes(0, 1)

    def joined(z: Any) -> Any:
        return z.swapaxes(0, 1).reshape(length, width)

    q, k, v = (split(x @ weights[i] + biases[i]) for i in range(3))
    scale = (width // heads) ** -0.5
    p = _softmax(q @ k.swapaxes(1, 2) * scale)
    z = p @ v
    pairs = [(results[0][-1], joined(z) @ weights[3] + biases[3])]
    if job.kind == "layer_weights":
        pairs.append((results[1][-1], p.mean(0)))
    if job.kind == "layer_training":
        g = split(grad @ weights[3].T)
        of_scores = p * (g @ v.swapaxes(1, 2) - (g * z).sum(-1, keepdims=True)) * scale
        of_heads = of_scores @ k, of_scores.swapaxes(1, 2) @ q, p.swapaxes(1, 2) @ g
        pairs.append((results[1][-1], sum(joined(one) @ weights[i].T for i, one in enumerate(of_heads))))
    return pairs
