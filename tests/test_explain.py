"""`mha.explain` says what the call then does: kernels, threads, memory."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import emulator
import exporters
import numpy as np
import pytest

import mha
from mha import random
from mha.cpu import launch
from mha.gpu import launch as gpu_launch

#: Shapes (N, H, Hk, L, S, D, Dv) and options of a call.
CALLS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 4, 4, 70, 90, 16, 16), {}),
    "causal": ((1, 2, 2, 33, 65, 24, 8), dict(is_causal=True)),
    "one_query": ((1, 2, 2, 1, 1100, 16, 16), {}),
    "grouped_decode": ((1, 4, 2, 2, 1100, 16, 16), dict(enable_gqa=True)),
    "dropout": ((1, 2, 2, 20, 20, 8, 8), dict(dropout_p=0.3, dropout_state=(1, 2))),
    "no_keys": ((1, 2, 2, 3, 0, 8, 8), {}),
    "no_queries": ((1, 2, 2, 0, 3, 8, 8), {}),
    "no_samples": ((0, 2, 2, 4, 3, 8, 8), {}),
}


def arrays(shape: tuple[int, ...], dtype: Any = np.float32) -> tuple[Any, Any, Any]:
    n, h, hk, queries, keys, d, dv = shape
    rng = np.random.default_rng(0)
    shapes = (n, h, queries, d), (n, hk, keys, d), (n, hk, keys, dv)
    q, k, v = (rng.standard_normal(each).astype(dtype) for each in shapes)
    return q, k, v


def both(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
    """The forward and the backward that an explanation is about."""
    output, lse = mha.scaled_dot_product_attention(q, k, v, return_lse=True, **options)
    return mha.scaled_dot_product_attention_backward(output, q, k, v, output, lse, **options)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_kernels_of_a_cpu_call(name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, options = CALLS[name]
    given = arrays(shape, dtype)
    explained = mha.explain(*given, **options)
    seen = []
    real = launch.Launch.run

    def spy(self: launch.Launch, kernel: str, threads: int) -> int:
        tiles = [self.values[self.table.index[name]] for name in ("vectors", "panels", "key_block", "splits", "fused")]
        scratch = getattr(self.kernels, f"{kernel}_scratch")(self.packed(), self.double) * threads
        seen.append((kernel, threads, scratch, None if kernel == "attention_delta" else tiles))
        return real(self, kernel, threads)

    monkeypatch.setattr(launch.Launch, "run", spy)
    both(*given, options)
    expected = []
    for use in (*explained.forward.kernels, *explained.backward.kernels):
        tiles = dict(use.tiles)
        cut = [tiles[name] for name in ("vectors", "panels", "key_block")] if tiles else None
        cut = cut and [*cut, use.splits, tiles.get("fused", 0)]
        expected += [] if use.when else [(use.name, use.threads, use.memory, cut)]
    assert seen == expected
    assert explained.backend == "cpu"
    if name not in ("no_queries", "no_samples"):
        assert seen


#: Shapes whose every part of the memory is larger than what Python's own objects take.
LARGE: dict[str, tuple[int, ...]] = {
    "forward": (2, 64, 64, 200, 64, 16, 16),
    "decode": (1, 2, 2, 4, 20_000, 16, 128),
}


#: For Python's own objects.
SLACK = 30_000


def peak(function: Any) -> int:
    """Bytes that NumPy and Python allocate at most, less what was there before; recording a call takes more, once."""
    for _ in range(3):
        function()
    tracemalloc.start()
    try:
        results = function()
        found = tracemalloc.get_traced_memory()[1]
        del results  # alive until here
        return found
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", LARGE)
def test_the_memory_of_a_cpu_call(name: str) -> None:
    q, k, v = arrays(LARGE[name])
    explained = mha.explain(q, k, v)
    found = peak(lambda: mha.scaled_dot_product_attention(q, k, v, return_lse=True))
    stated = explained.forward.output_bytes + explained.forward.temporary_bytes
    assert stated <= found <= stated + SLACK
    output, lse = mha.scaled_dot_product_attention(q, k, v, return_lse=True)
    found = peak(lambda: mha.scaled_dot_product_attention_backward(output, q, k, v, output, lse))
    # Without the pass that a coarse log-sum-exp needs.
    unused = lse.nbytes + max(use.memory for use in explained.backward.kernels)
    unused -= max(use.memory for use in explained.backward.kernels if not use.when)
    stated = explained.backward.output_bytes + explained.backward.temporary_bytes - unused
    assert stated <= found <= stated + SLACK


def test_a_coarse_log_sum_exp_runs_what_was_conditional(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = arrays(CALLS["plain"][0])
    conditional = [use.name for use in mha.explain(30 * q, k, v).backward.kernels if use.when]
    seen = []
    real = launch.Launch.run
    monkeypatch.setattr(
        launch.Launch, "run", lambda self, kernel, threads: (seen.append(kernel), real(self, kernel, threads))[1]
    )
    both(30 * q, k, v, {})
    assert conditional == ["attention_weights"]
    assert seen.count("attention_weights") == 1


@pytest.mark.skipif(emulator.compiler() is None, reason="g++, which compiles the emulated kernels, is not installed")
@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_of_a_gpu_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = emulator.install()
    shape, options = CALLS[name]
    given = tuple(map(emulator.asarray, arrays(shape)))
    explained = mha.explain(*given, **options)
    assert explained.backend == "gpu"
    assert "emulated, compute capability 9.0, 132 multiprocessors" in str(explained)
    seen = []
    real = gpu_launch.Launch.run

    def spy(self: gpu_launch.Launch, plan: Any) -> None:
        tiles = tuple((name.removeprefix("MHA_").lower(), value) for name, value in plan.defines)
        seen.append((plan.kernel, plan.grid, plan.threads, plan.shared, plan.splits, tiles))
        real(self, plan)

    monkeypatch.setattr(gpu_launch.Launch, "run", spy)
    runtime.launched.clear()
    both(*given, options)
    uses = [*explained.forward.kernels, *explained.backward.kernels]
    assert [(use.name, use.grid, use.threads, use.memory, use.splits, use.tiles) for use in uses] == seen
    assert [use.name for use in uses] == runtime.launched


@pytest.mark.skipif(emulator.compiler() is None, reason="g++, which compiles the emulated kernels, is not installed")
@pytest.mark.parametrize("name", LARGE)
def test_the_memory_of_a_gpu_call(name: str) -> None:
    emulator.install()
    q, k, v = map(emulator.asarray, arrays(LARGE[name]))
    explained = mha.explain(q, k, v)
    found = peak(lambda: mha.scaled_dot_product_attention(q, k, v, return_lse=True))
    stated = explained.forward.output_bytes + explained.forward.temporary_bytes
    assert stated <= found <= stated + SLACK
    output, lse = mha.scaled_dot_product_attention(q, k, v, return_lse=True)
    found = peak(lambda: mha.scaled_dot_product_attention_backward(output, q, k, v, output, lse))
    stated = explained.backward.output_bytes + explained.backward.temporary_bytes
    assert stated <= found <= stated + SLACK


def test_as_text_and_as_plain_values() -> None:
    q, k, v = arrays(CALLS["plain"][0])
    explained = mha.explain(q, k, v)
    text = str(explained)
    assert text.startswith("N 2, H 4, Hk 4, L 70, S 90, D 16, Dv 16, float32\ncpu backend (the arrays are numpy's): ")
    for use in (*explained.forward.kernels, *explained.backward.kernels):
        assert use.name in text
        assert use.why in text
    facts = json.loads(json.dumps(explained.as_dict()))
    assert facts["forward"]["kernels"][0]["tiles"]["key_block"] == 64
    assert facts["forward"]["output_bytes"] == 2 * 4 * 70 * 17 * 4
    assert "shape" not in facts
    with pytest.raises(AttributeError):
        explained.backend = "other"  # type: ignore[misc]


def test_nothing_is_run_or_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.Launch, "run", None)
    mha.seed(5)
    first = random.next_state()
    explained = mha.explain(*arrays(CALLS["plain"][0]), dropout_p=0.5)
    assert random.next_state().offset == first.offset + 1
    assert explained.forward.kernels


def test_a_forced_backend_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHA_BACKEND", "reference")
    explained = mha.explain(*arrays(CALLS["plain"][0]))
    assert explained.backend == "reference"
    assert explained.why == "MHA_BACKEND is reference"
    assert explained.forward.temporary_bytes == 2 * 4 * 70 * 90 * 4
    assert "no kernel" in str(explained)


def test_bad_calls_are_the_functions_own() -> None:
    q, k, v = arrays(CALLS["plain"][0])
    with pytest.raises(ValueError, match="same length S"):
        mha.explain(q, k, v[:, :, 1:])
    with pytest.raises(TypeError, match="dtypes differ"):
        mha.explain(q, k.astype(np.float64), v)


def test_the_parameters_are_the_functions_own() -> None:
    import inspect

    found, expected = map(inspect.signature, (mha.explain, mha.scaled_dot_product_attention))
    assert found.parameters == expected.parameters


def test_other_libraries_arrays() -> None:
    given = arrays(CALLS["plain"][0])
    assert mha.explain(*map(exporters.Tensor, given)) == mha.explain(*given)
