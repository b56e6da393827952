"""A call made again from its recording gives what an ordinary call gives, and what cannot be repeated is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from cases import CASES, Case, call_options

import mha
from mha.cpu import replay

PLAIN = [case for case in CASES if not case.mask and not case.lengths and not case.options.get("dropout_p")
         and isinstance(case.options.get("causal_offset", 0), int)]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_recorded() -> Iterator[None]:
    replay.forget()
    yield
    replay.forget()


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function with nothing recorded or repeated."""

    def call(function: Any, *args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            for module in ("mha.core.repeat", "mha.packed_call.repeat"):
                patch.setattr(module, lambda call, arrays, options: call(*arrays))
            return function(*args, **options)

    return call


def same(found: Any, expected: Any) -> None:
    for x, y in zip(found, expected, strict=True):
        if y is None:
            assert x is None
            continue
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_attention_repeated(case: Case, dtype: Any, ordinary: Any) -> None:
    options = call_options(case, {})
    recorded = 0
    for salt in range(4):
        arrays = dataclasses.replace(case, magnitude=case.magnitude * (1 + salt)).inputs(dtype)
        inputs = [arrays[name] for name in ("query", "key", "value")]
        before = [x.tobytes() for x in inputs]
        expected = ordinary(mha.scaled_dot_product_attention, *inputs, **options, return_lse=True)
        same(mha.scaled_dot_product_attention(*inputs, **options, return_lse=True), expected)
        assert [x.tobytes() for x in inputs] == before
        recorded = len(replay._recordings)
    assert recorded == (0 if 0 in (x.size for x in inputs) else 1) or 0 in expected[0].shape


def layers() -> list[Any]:
    made = [pytest.param(options, id="-".join(f"{k}={v}" for k, v in options.items()) or "plain") for options in (
        {}, {"bias": False}, {"num_kv_heads": 2}, {"kdim": 24, "vdim": 40}, {"dtype": np.float64},
        {"dtype": np.float16}, {"scale": 0.3})]  # fmt: skip
    return made


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", layers())
@pytest.mark.parametrize("length", [1, 5, 70])
def test_layers_repeated(options: dict[str, Any], length: int, frozen: bool, ordinary: Any) -> None:
    layer = mha.MultiHeadAttention(32, 4, **options).eval()
    rng = np.random.default_rng(3)
    for salt in range(4):
        layer.train()
        layer.io_weight_bias[...] = rng.standard_normal(layer.layout.length)
        layer.freeze() if frozen else layer.eval()
        widths = (32, options.get("kdim", 32), options.get("vdim", 32))
        q, k, v = (rng.standard_normal((2, length, width)).astype(layer.dtype) for width in widths)
        for causal in (False, True):
            same(layer(q, k, v, is_causal=causal), ordinary(layer, q, k, v, is_causal=causal))
        assert len(replay._recordings) == 2 * (salt >= replay._SIGHTINGS - 1)


def packed_options(vector: Any, **more: Any) -> dict[str, Any]:
    return dict(embed_dim=16, num_heads=2, attn_drop=0.3, out_drop=0.2, io_weight_bias=vector, training=False) | more


@pytest.mark.parametrize(
    "more",
    [{}, {"qbias": True, "obias": True}, {"reslink": True}, {"oproj_size": 0}, {"oproj_size": 0, "reslink": True},
     {"qproj_size": 0, "kproj_size": 0, "vproj_size": 0}, {"window": 2}, {"softcap": 2.0, "causal_offset": 1}],
)  # fmt: skip
@pytest.mark.parametrize("batched", [False, True])
def test_the_packed_function_repeated(more: dict[str, Any], batched: bool, ordinary: Any) -> None:
    rng = np.random.default_rng(3)
    parts = {name: x for name, x in more.items() if name.endswith(("size", "bias"))}
    width = 32 if more.get("vproj_size") == 0 else 16
    parts |= {} if width == 16 else {"oproj_size": 16}
    layout = mha.PackedLayout(16, 2, **parts)
    for _ in range(4):
        vector = rng.standard_normal(layout.length).astype("f4")
        x = rng.standard_normal((3, 7, 16) if batched else (7, 16)).astype("f4")
        given = packed_options(vector, **(more | parts))
        same(mha.multi_head_attention(x, x, x, **given)[:2], ordinary(mha.multi_head_attention, x, x, x, **given)[:2])


def test_a_second_look_at_weights_that_were_zero(ordinary: Any) -> None:
    layer = mha.MultiHeadAttention(16, 2).eval()
    x = np.random.default_rng(0).standard_normal((1, 1, 16)).astype("f4")
    for _ in range(3):
        layer(x, x, x)
    for bias in (name for name in layer.layout.views(layer.io_weight_bias) if name.endswith("bias")):
        layer.layout.views(layer.io_weight_bias)[bias][...] = 1
        same(layer(x, x, x), ordinary(layer, x, x, x))


def test_results_have_memory_of_their_own() -> None:
    x = np.ones((1, 2, 4, 8), np.float32)
    results = [mha.scaled_dot_product_attention(x, x, x * i) for i in range(6)]
    for i, result in enumerate(results):
        assert (result == i).all()
        assert result.flags.writeable


def test_settings_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, 40, 8)).astype("f4")
    expected = mha.scaled_dot_product_attention(x, x, x)
    for _ in range(3):
        mha.scaled_dot_product_attention(x, x, x)
    assert len(replay._recordings) == 1
    monkeypatch.setenv("MHA_BACKEND", "gpu")
    with pytest.raises(RuntimeError, match="does not compute on numpy arrays"):
        mha.scaled_dot_product_attention(x, x, x)
    monkeypatch.delenv("MHA_BACKEND")
    monkeypatch.setenv("MHA_CPU_ISA", "none")
    with pytest.raises(RuntimeError, match="MHA_CPU_ISA"):
        mha.scaled_dot_product_attention(x, x, x)
    monkeypatch.setenv("MHA_CPU_ISA", "baseline")
    np.testing.assert_allclose(mha.scaled_dot_product_attention(x, x, x), expected, rtol=1e-5, atol=1e-6)
    assert len(replay._recordings) == 1


def test_other_arrays_are_still_checked() -> None:
    x = np.ones((1, 2, 4, 8), np.float32)
    for _ in range(4):
        mha.scaled_dot_product_attention(x, x, x)
    with pytest.raises(ValueError, match="last size"):
        mha.scaled_dot_product_attention(x, x[..., :4], x)
    with pytest.raises(TypeError, match="dtype"):
        mha.scaled_dot_product_attention(x, x.astype("f8"), x)
    with pytest.raises(ValueError, match="window"):
        mha.scaled_dot_product_attention(x, x, x, window=-5)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert (mha.scaled_dot_product_attention(unaligned, unaligned, unaligned) == 1).all()


def test_what_cannot_be_repeated() -> None:
    rng = np.random.default_rng(0)
    secret = rng.standard_normal((1, 2, 4, 8)).astype("f4")
    attend = mha.scaled_dot_product_attention
    calls = {
        "a result of NumPy's": lambda x: attend(x, x, x) + 1,
        "a copy between kernels": lambda x: attend(attend(x, x, x).copy(), x, x),
        "a change between kernels": lambda x: attend(_plus_one(attend(x, x, x)), x, x),
        "an array that is not handed in": lambda x: attend(secret, x, x),
        "an argument itself": lambda x: x,
    }
    for name, call in calls.items():
        for _ in range(12):
            x = rng.standard_normal((1, 2, 4, 8)).astype("f4")
            assert replay.repeat(call, (x,), (name,)).tobytes() == call(x).tobytes(), name


def _plus_one(x: Any) -> Any:
    x += 1
    return x


def test_many_threads_repeat_one_recording() -> None:
    rng = np.random.default_rng(0)
    layer = mha.MultiHeadAttention(32, 4).freeze()
    inputs = [rng.standard_normal((1, 3, 32)).astype("f4") for _ in range(16)]
    expected = [layer(x, x, x)[0].tobytes() for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            assert [r[0].tobytes() for r in pool.map(lambda x: layer(x, x, x), inputs)] == expected


def test_a_decoding_loop_records_nothing() -> None:
    for keys in range(1, 40):
        x = np.ones((1, 2, keys, 8), np.float32)
        mha.scaled_dot_product_attention(x[:, :, :1], x, x)
    assert not replay._recordings
