"""compat.paddle beside what the recordings show: gradients with caches and dropout, dtypes, the layer, bad calls."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

import mha
from mha.compat import paddle
from mha.optional import bfloat16

RNG = np.random.default_rng(0)
HEADS, WIDTH, FEATURES = 3, 4, 12


def array(*shape: int) -> Any:
    return RNG.standard_normal(shape)


def arguments(pre: bool, transposed: bool = False, cached: int | None = None) -> dict[str, Any]:
    inner = HEADS * WIDTH
    norm = "pre_ln" if pre else "ln"
    given = {
        "x": array(2, 5, FEATURES), "linear_weight": array(inner, FEATURES), "linear_bias": array(FEATURES),
        "qkv_weight": array(FEATURES, 3 * inner) if transposed else array(3, HEADS, WIDTH, FEATURES),
        "qkv_bias": array(3 * inner) if transposed else array(3, HEADS, WIDTH),
        f"{norm}_scale": array(FEATURES), f"{norm}_bias": array(FEATURES), "pre_layer_norm": pre,
        "attn_mask": array(2, 1, 5, 5 + (cached or 0)), "dropout_rate": 0.0, "attn_dropout_rate": 0.0,
    }  # fmt: skip
    if transposed:
        given |= {"transpose_qkv_wb": True, "num_heads": HEADS}
    if cached is not None:
        given["cache_kv"] = array(2, 2, HEADS, cached, WIDTH)
    return given


CASES = {
    "post": arguments(False), "pre": arguments(True), "transposed": arguments(True, True),
    "cache": arguments(False, cached=3), "cache transposed": arguments(True, True, cached=7),
    "empty cache": arguments(True, cached=0), "no residual": arguments(True) | {"add_residual": False},
    "dropout": arguments(False) | {"dropout_rate": 0.3, "attn_dropout_rate": 0.4},
    "dropout pre": arguments(True) | {"dropout_rate": 0.3, "attn_dropout_rate": 0.4},
    "downscale": arguments(False) | {"dropout_rate": 0.3, "attn_dropout_rate": 0.4, "mode": "downscale_in_infer"},
    "downscale eval": arguments(True) | {"dropout_rate": 0.3, "attn_dropout_rate": 0.4, "training": False,
                                         "mode": "downscale_in_infer"},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_central_differences(name: str) -> None:
    """Those that Paddle has wrong included: linear_bias under dropout, everything with a cache."""
    given = CASES[name]

    def output(**changes: Any) -> Any:
        mha.seed(1)
        result = paddle.fused_multi_head_attention(**(given | changes))
        return result[0] if isinstance(result, tuple) else result

    up = array(*output().shape)
    mha.seed(1)
    _, backward = paddle.fused_multi_head_attention_vjp(**given)
    gradients = backward(up, mask_gradients=True)
    floating = {n for n, x in given.items() if isinstance(x, np.ndarray)}
    assert gradients.keys() == floating
    for n in floating:
        assert gradients[n].shape == given[n].shape
        if not given[n].size:
            continue
        direction, step = array(*given[n].shape), 1e-6
        sides = [(output(**{n: given[n] + sign * step * direction}) * up).sum() for sign in (1, -1)]
        slope = (sides[0] - sides[1]) / (2 * step)
        assert abs(slope - (gradients[n] * direction).sum()) <= 2e-6 * max(1, abs(slope)), n


@pytest.mark.parametrize("name", CASES)
def test_kernels_and_reference_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the package's own dropout, in both modes."""
    given, results = CASES[name], []
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("MHA_BACKEND", backend)
        mha.seed(5)
        result, backward = paddle.fused_multi_head_attention_vjp(**given)
        output = result[0] if isinstance(result, tuple) else result
        results.append({"output": output} | backward(np.cos(output), mask_gradients=True))
    for n, x in results[0].items():
        np.testing.assert_allclose(x, results[1][n], rtol=1e-9, atol=1e-11, err_msg=n)


def test_a_cache_is_grown_and_equals_one_call() -> None:
    """Two halves under a causal mask are one whole."""
    given = {n: x for n, x in arguments(True).items() if n != "attn_mask"}
    x = given.pop("x")
    causal = np.tri(5, dtype=bool)
    whole = paddle.fused_multi_head_attention(x, **given, attn_mask=causal)
    cache = np.zeros((2, 2, HEADS, 0, WIDTH))
    first, cache = paddle.fused_multi_head_attention(x[:, :2], **given, cache_kv=cache, attn_mask=causal[:2, :2])
    assert cache.shape == (2, 2, HEADS, 2, WIDTH)
    before = cache.copy()
    second, grown = paddle.fused_multi_head_attention(x[:, 2:], **given, cache_kv=cache, attn_mask=causal[2:])
    np.testing.assert_array_equal(cache, before)
    np.testing.assert_array_equal(grown[:, :, :, :2], before)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, rtol=1e-11, atol=1e-13)


def test_modes_and_rates() -> None:
    given = arguments(True) | {"add_residual": False}
    plain = paddle.fused_multi_head_attention(**given)
    rates = {"dropout_rate": 0.25, "attn_dropout_rate": 0.5}
    upscale = {"mode": "upscale_in_train", "training": False}
    np.testing.assert_array_equal(paddle.fused_multi_head_attention(**(given | rates | upscale)), plain)
    np.testing.assert_array_equal(
        paddle.fused_multi_head_attention(**(given | upscale | {"dropout_rate": 1.0, "attn_dropout_rate": 1.0})), plain
    )
    down = {"mode": "downscale_in_infer", "training": False}
    bias = given["linear_bias"]
    np.testing.assert_allclose(
        paddle.fused_multi_head_attention(**(given | rates | down)), 0.75 * (0.5 * (plain - bias) + bias), rtol=1e-11
    )
    mha.seed(2)
    dropped = paddle.fused_multi_head_attention(**(given | {"dropout_rate": 0.25}))
    mha.seed(2)
    kept = paddle.fused_multi_head_attention(**(given | {"dropout_rate": 0.25, "mode": "downscale_in_infer"}))
    np.testing.assert_allclose(dropped[dropped != 0] * 0.75, kept[kept != 0], rtol=1e-12)
    assert 0 < (kept == 0).mean() < 0.6
    for mode in ("upscale_in_train", "downscale_in_infer"):
        assert not paddle.fused_multi_head_attention(**(given | {"dropout_rate": 1.0, "mode": mode})).any()
        only_bias = paddle.fused_multi_head_attention(**(given | {"attn_dropout_rate": 1.0, "mode": mode}))
        np.testing.assert_allclose(only_bias, np.broadcast_to(bias, only_bias.shape))


def test_defaults_drop() -> None:
    given = {n: x for n, x in arguments(True).items() if "dropout" not in n}
    mha.seed(1)
    first, second = (paddle.fused_multi_head_attention(**given) for _ in range(2))
    assert not np.allclose(first, second)


@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5), (2, 1, 1, 5), (1, 1, 5, 5), (1, 5), (5,), (2, 3, 5, 1)])
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    given = {n: x for n, x in CASES["pre"].items() if n != "attn_mask"}
    mask = array(*shape)
    full = np.broadcast_to(mask, (2, 3, 5, 5)).copy()
    result, backward = paddle.fused_multi_head_attention_vjp(**given, attn_mask=mask)
    right, backward_right = paddle.fused_multi_head_attention_vjp(**given, attn_mask=full)
    np.testing.assert_allclose(result, right, rtol=1e-12)
    gradient = backward(result, mask_gradients=True)["attn_mask"]
    expected = backward_right(result, mask_gradients=True)["attn_mask"]
    axes = tuple(i for i, n in enumerate((1,) * (4 - len(shape)) + shape) if n == 1)
    np.testing.assert_allclose(gradient, expected.sum(axis=axes, keepdims=True).reshape(shape), rtol=1e-8, atol=1e-11)


def test_a_row_that_attends_to_nothing_has_attention_zero() -> None:
    given = arguments(True) | {"attn_mask": np.zeros((5, 5), bool), "add_residual": False}
    result = paddle.fused_multi_head_attention(**given)
    np.testing.assert_array_equal(result, np.broadcast_to(given["linear_bias"], result.shape))


HALVES = [np.dtype(np.float16), *([bfloat16] if bfloat16 is not None else [])]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("pre", [False, True])
def test_half_precision_with_single_norms(pre: bool, dtype: Any) -> None:
    given = arguments(pre)
    exact = {n: x.astype(dtype).astype(float) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    halves = {n: x.astype(np.float32 if "ln_" in n else dtype) if isinstance(x, np.ndarray) else x
              for n, x in exact.items()}  # fmt: skip
    result, backward = paddle.fused_multi_head_attention_vjp(**halves)
    right, backward_right = paddle.fused_multi_head_attention_vjp(**exact)
    assert result.dtype == dtype
    spacing = 2.0**-7 if dtype == bfloat16 else 2.0**-10
    assert np.abs(result.astype(float) - right).max() <= 30 * spacing * np.abs(right).max()
    gradients, expected = backward(result), backward_right(right)
    for n, x in gradients.items():
        assert x.dtype == halves[n].dtype
        assert np.abs(x.astype(float) - expected[n]).max() <= 60 * spacing * np.abs(expected[n]).max(), n


@pytest.mark.parametrize("sizes", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("pre", [False, True])
def test_sizes_of_zero(sizes: tuple[int, int], pre: bool) -> None:
    given = arguments(pre) | {"x": np.zeros((*sizes, FEATURES)), "attn_mask": None, "dropout_rate": 0.5}
    result, backward = paddle.fused_multi_head_attention_vjp(**given)
    assert result.shape == (*sizes, FEATURES)
    assert not any(x.any() for x in backward(result).values())


def test_inputs_may_be_views() -> None:
    given = arguments(False)
    wide = {n: np.repeat(x, 2, axis=-1)[..., ::2] if isinstance(x, np.ndarray) else x for n, x in given.items()}
    np.testing.assert_allclose(
        paddle.fused_multi_head_attention(**wide), paddle.fused_multi_head_attention(**given), rtol=1e-12
    )


def test_signature_is_paddles() -> None:
    parameters = inspect.signature(paddle.fused_multi_head_attention).parameters.values()
    assert [(p.name, p.default) for p in parameters][3:] == [
        ("pre_layer_norm", False), ("pre_ln_scale", None), ("pre_ln_bias", None), ("ln_scale", None),
        ("ln_bias", None), ("pre_ln_epsilon", 1e-5), ("qkv_bias", None), ("linear_bias", None), ("cache_kv", None),
        ("attn_mask", None), ("dropout_rate", 0.5), ("attn_dropout_rate", 0.5), ("ln_epsilon", 1e-5),
        ("training", True), ("mode", "upscale_in_train"), ("ring_id", -1), ("add_residual", True), ("num_heads", -1),
        ("transpose_qkv_wb", False), ("name", None),
    ]  # fmt: skip
    made = list(inspect.signature(paddle.FusedMultiHeadAttention).parameters)
    assert made[:21] == [
        "embed_dim", "num_heads", "dropout_rate", "attn_dropout_rate", "kdim", "vdim", "normalize_before",
        "need_weights", "qkv_weight_attr", "qkv_bias_attr", "linear_weight_attr", "linear_bias_attr",
        "pre_ln_scale_attr", "pre_ln_bias_attr", "ln_scale_attr", "ln_bias_attr", "epsilon", "nranks", "ring_id",
        "transpose_qkv_wb", "name",
    ]  # fmt: skip


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_layer_is_the_function_with_its_parameters(before: bool, transposed: bool) -> None:
    layer = paddle.FusedMultiHeadAttention(
        48, 3, 0.2, 0.3, normalize_before=before, transpose_qkv_wb=transposed, epsilon=1e-3, dtype="float64"
    )
    norm = ["pre_ln_scale", "pre_ln_bias"] if before else ["ln_scale", "ln_bias"]
    assert list(layer.state_dict()) == ["qkv_weight", "qkv_bias", "linear_weight", "linear_bias", *norm]
    # Conv-like fans of four axes; 0.0361 and 0.1768 are Paddle's.
    bound = 0.17678 if transposed else 0.03608
    assert 0.97 * bound < np.abs(layer.qkv_weight).max() <= 1.001 * bound
    assert 0.97 * 0.25 < np.abs(layer.linear_weight).max() <= 0.25
    x, mask, up = array(2, 6, 48), np.tri(6, dtype=bool), array(2, 6, 48)
    mha.seed(3)
    output = layer(x, attn_mask=mask)
    mha.seed(3)
    right, backward = paddle.fused_multi_head_attention_vjp(
        x, pre_layer_norm=before, dropout_rate=0.2, attn_dropout_rate=0.3, attn_mask=mask, pre_ln_epsilon=1e-3,
        ln_epsilon=1e-3, transpose_qkv_wb=transposed, num_heads=3, **layer.state_dict(),
    )  # fmt: skip
    np.testing.assert_array_equal(output, right)
    gradients, expected = layer.backward(up), backward(up)
    np.testing.assert_array_equal(gradients.query, expected["x"])
    for name, x in gradients.parameters.items():
        np.testing.assert_array_equal(x, expected[name])
    with pytest.raises(RuntimeError):
        layer.backward(up)


def test_layer_options() -> None:
    layer = paddle.FusedMultiHeadAttention(12, 3, qkv_bias_attr=False, linear_bias_attr=np.arange(12.0),
                                           ln_scale_attr=False, kdim=99)  # fmt: skip
    assert layer.qkv_bias is None
    assert layer.ln_scale is None
    assert layer.pre_ln_scale is None
    np.testing.assert_array_equal(layer.linear_bias, np.arange(12.0))
    x = array(2, 5, 12).astype("f4")
    layer.eval()
    np.testing.assert_array_equal(layer(x, x, x), layer(x))
    assert repr(eval(repr(layer), vars(paddle))) == repr(layer)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        np.testing.assert_array_equal(other(x), layer(x))
    output, cache = layer(x, cache=np.zeros((2, 2, 3, 0, 4), "f4"))
    np.testing.assert_array_equal(output, layer(x))
    assert cache.shape == (2, 2, 3, 5, 4)
    with pytest.raises(ValueError, match="key"):
        layer(x, x + 1)


def test_initial_values_and_what_has_no_effect() -> None:
    values = {name: array(*shape).astype("f4") for name, shape in
              {"qkv_weight": (3, 3, 4, 12), "linear_weight": (12, 12), "pre_ln_scale": (12,), "pre_ln_bias": (12,),
               "ln_bias": (12,)}.items()}  # fmt: skip
    attrs = {f"{name}_attr": x for name, x in values.items()}
    for before in (False, True):
        layer = paddle.FusedMultiHeadAttention(12, 3, normalize_before=before, vdim=7, name="attention", device="cpu",
                                               **attrs)  # fmt: skip
        for name, x in layer.state_dict().items():
            if name in values:
                np.testing.assert_array_equal(x, values[name])
        assert ("pre_ln_scale" in layer.state_dict()) == before
    with pytest.raises(TypeError):
        paddle.FusedMultiHeadAttention(12, 3, qkv_weight_attr=False)
    given = CASES["post"]
    np.testing.assert_array_equal(
        paddle.fused_multi_head_attention(**given, name="block"), paddle.fused_multi_head_attention(**given)
    )


def test_the_mask_of_the_layer_has_a_gradient() -> None:
    layer = paddle.FusedMultiHeadAttention(12, 3, 0.0, 0.0, dtype="float64")
    x, mask = array(2, 5, 12), array(5, 5)
    output = layer(x, attn_mask=mask)
    assert layer.backward(output).attn_mask is None
    layer(x, attn_mask=mask)
    gradient = layer.backward(output, mask_gradients=True).attn_mask
    assert gradient is not None
    assert np.abs(gradient.sum(axis=1)).max() < 1e-12 < np.abs(gradient).max()


GIVEN = arguments(False)
BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mode": ({"mode": "downgrade"}, ValueError, "downgrade"),
    "x": ({"x": array(5, 12)}, ValueError, r"\(5, 12\)"),
    "qkv rank": ({"qkv_weight": array(36, 12)}, ValueError, r"\(36, 12\).*transpose_qkv_wb"),
    "qkv width": ({"qkv_weight": array(3, 3, 4, 11)}, ValueError, r"\(3, 3, 4, 11\)"),
    "no heads": ({"transpose_qkv_wb": True, "qkv_weight": array(12, 36)}, ValueError, "num_heads is -1"),
    "heads": ({"transpose_qkv_wb": True, "qkv_weight": array(12, 36), "num_heads": 5}, ValueError, "num_heads 5"),
    "linear": ({"linear_weight": array(11, 12)}, ValueError, r"linear_weight must be \(12, 12\)"),
    "qkv bias": ({"qkv_bias": array(36)}, ValueError, r"qkv_bias must be \(3, 3, 4\)"),
    "linear bias": ({"linear_bias": array(11)}, ValueError, r"\(11,\)"),
    "norm": ({"ln_scale": array(0)}, ValueError, r"ln_scale has shape \(0,\)"),
    "norm dtype": ({"ln_bias": array(12).astype("f4")}, TypeError, "ln_bias is float32"),
    "epsilon": ({"ln_epsilon": -1.0}, ValueError, "ln_epsilon is -1.0"),
    "cache": ({"cache_kv": array(2, 2, 3, 4, 5)}, ValueError, r"cache_kv must be \(2, 2, 3, 4, 4\)"),
    "cache rank": ({"cache_kv": array(2, 2)}, ValueError, "cache_kv"),
    "mask": ({"attn_mask": array(4, 5)}, ValueError, r"\(4, 5\)|\(1, 1, 4, 5\)"),
    "ring": ({"ring_id": 0}, ValueError, "no communicator"),
    "residual": ({"add_residual": False}, ValueError, "add_residual=False"),
    "rate": ({"dropout_rate": 1.5}, ValueError, "dropout_rate is 1.5"),
    "dtype": ({"linear_weight": array(12, 12).astype("f4")}, TypeError, "dtypes differ"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_name_what_is_wrong(name: str) -> None:
    changes, error, text = BAD_CALLS[name]
    with pytest.raises(error, match=text):
        paddle.fused_multi_head_attention(**(GIVEN | changes))


def test_bad_layers() -> None:
    for bad in (lambda: paddle.FusedMultiHeadAttention(10, 3), lambda: paddle.FusedMultiHeadAttention(0, 1),
                lambda: paddle.FusedMultiHeadAttention(12, 3, need_weights=True),
                lambda: paddle.FusedMultiHeadAttention(12, 3, nranks=2, ring_id=0),
                lambda: paddle.FusedMultiHeadAttention(12, 3, nranks=3),
                lambda: paddle.FusedMultiHeadAttention(12, 3, linear_bias_attr=np.zeros(3))):  # fmt: skip
        with pytest.raises(ValueError, match=r"[.]$"):
            bad()


def test_bad_gradients() -> None:
    result, backward = paddle.fused_multi_head_attention_vjp(**GIVEN)
    with pytest.raises(ValueError, match=r"\(2, 5, 11\)"):
        backward(result[..., :11])
    with pytest.raises(ValueError, match="no weights"):
        backward(result, result)
