"""Equal bits for any number of threads, and the team is really as large as asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import mha
from mha.cpu import launch, load

COUNTS = (1, 2, 3, 8)
serial = pytest.mark.skipif(not load.runtime().OPENMP, reason="a serial build: compiled without OpenMP")


@pytest.fixture
def teams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """The kernels called and the size of the team each really had."""
    seen: list[tuple[str, int]] = []
    original = launch.Launch.run

    def recording(self: launch.Launch, kernel: str, threads: int) -> int:
        team = original(self, kernel, threads)
        seen.append((kernel, team))
        return team

    monkeypatch.setattr(launch.Launch, "run", recording)
    yield seen
    mha.set_num_threads(None)


def normal(*shape: int) -> Any:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def everything(results: Any) -> bytes:
    return b"".join(x.tobytes() for x in results if isinstance(x, np.ndarray))


def attention(heads: int, queries: int, keys: int, **options: Any) -> bytes:
    q, k, v, g = normal(1, heads, queries, 48), normal(1, heads, keys, 48), normal(1, heads, keys, 33), None
    output, lse = mha.scaled_dot_product_attention(q, k, v, return_lse=True, **options)
    g = normal(*output.shape)
    gradients = mha.scaled_dot_product_attention_backward(g, q, k, v, output, lse, **options)
    return everything([output, lse, *gradients])


CALLS = {
    "many_heads": (lambda: attention(16, 150, 170), {"attention_forward", "attention_backward"}),
    "one_head": (lambda: attention(1, 700, 700, is_causal=True), {"attention_forward", "attention_backward_query"}),
    "scale": (lambda: attention(3, 300, 300, scale=0.3), {"attention_forward", "attention_backward"}),
    "dropout": (lambda: attention(2, 300, 300, dropout_p=0.3, dropout_state=(1, 2)), {"attention_forward"}),
    "decode": (lambda: attention(4, 2, 9000), {"attention_decode"}),
}


@serial
@pytest.mark.parametrize("name", CALLS)
def test_attention_has_the_same_bits(name: str, level: str, teams: list[tuple[str, int]]) -> None:
    call, kernels = CALLS[name]
    results = {}
    for count in COUNTS:
        mha.set_num_threads(count)
        teams.clear()
        results[count] = call()
        largest = {kernel: max(team for k, team in teams if k == kernel) for kernel, _ in teams}
        assert max(largest.values()) == count, largest
        if count == 8:
            assert kernels <= set(largest), largest
    assert all(result == results[1] for result in results.values())


@serial
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_whole_layer_has_the_same_bits(dtype: Any, level: str, teams: list[tuple[str, int]]) -> None:
    mha.seed(3)
    layer = mha.MultiHeadAttention(192, 6, 0.1, 0.1, dtype=dtype)
    x, g = (normal(2, 130 + i, 192)[:, :130].astype(dtype) for i in range(2))
    results = {}
    for count in COUNTS:
        mha.set_num_threads(count)
        mha.seed(5)
        teams.clear()
        output, weights = layer(x, x, x, need_weights=True, average_attn_weights=True)
        results[count] = everything([output, weights, *layer.backward(g, weights)])
        assert max(team for kernel, team in teams if kernel == "product") == count
        assert max(team for kernel, team in teams if kernel == "attention_weights") == count
    assert all(result == results[1] for result in results.values())
