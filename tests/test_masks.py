"""Masks of both conventions against definitions written out element by element, and every refusal."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mha.masks import MaskSpec, for_multi_head_attention, for_scaled_dot_product, materialise
from mha.optional import bfloat16

N, H, L, S = 2, 3, 4, 5
F32_MIN = np.finfo(np.float32).min


def layer(attn_mask=None, key_padding_mask=None, **options):
    sizes = {"batch": N, "heads": H, "queries": L, "keys": S, "dtype": np.float32}
    return for_multi_head_attention(attn_mask, key_padding_mask, **(sizes | options))


def product(attn_mask=None, **options):
    sizes = {"batch_shape": (N,), "heads": H, "queries": L, "keys": S, "dtype": np.float32}
    return for_scaled_dot_product(attn_mask, **(sizes | options))


def visible(spec: MaskSpec, batch_shape=(N,), queries=L, keys=S) -> np.ndarray:
    return materialise(spec, batch_shape, H, queries, keys)[0]


def flags(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape) < 0.5


def floats(*shape: int, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def test_no_mask_shows_everything():
    for spec in (layer(), product()):
        shown, bias = materialise(spec, (N,), H, L, S)
        assert shown.shape == (N, H, L, S)
        assert shown.all()
        assert bias is None


@pytest.mark.parametrize("shape", [(L, S), (N * H, L, S), (N, H, L, S), (N, 1, L, S), (1, H, 1, S)])
def test_layer_masks_true_ignores(shape):
    mask = flags(*shape)
    expected = np.broadcast_to(mask.reshape(N, H, L, S) if mask.ndim == 3 else mask, (N, H, L, S))
    np.testing.assert_array_equal(visible(layer(mask)), ~expected)


@pytest.mark.parametrize("shape", [(L, S), (1, S), (L, 1), (H, L, S), (1, L, S), (N, 1, L, S), (N, H, L, S)])
def test_product_masks_true_attends(shape):
    mask = flags(*shape)
    np.testing.assert_array_equal(visible(product(mask)), np.broadcast_to(mask, (N, H, L, S)))


@pytest.mark.parametrize("mask", [flags(L, S), flags(N, 1, L, S), floats(N * H, L, S)])
def test_nothing_is_copied(mask):
    spec = layer(mask)
    view = spec.pair_bias if spec.pair_keep is None else spec.pair_keep
    assert view.shape == (N, H, L, S)
    assert np.shares_memory(view, mask)


def test_float_masks_are_added():
    pairs, padding = floats(N * H, L, S), floats(N, S)
    pairs[0, 1, 2], padding[1, 3] = -np.inf, -np.inf
    shown, bias = materialise(layer(pairs, padding), (N,), H, L, S)
    expected = pairs.reshape(N, H, L, S).astype(float) + padding[:, None, None, :]
    np.testing.assert_array_equal(shown, expected > -np.inf)
    np.testing.assert_array_equal(bias[shown], expected[shown])
    assert not bias[~shown].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_finite_minima_stay_visible_and_finite(dtype):
    lowest = np.finfo(dtype).min
    spec = layer(np.full((L, S), lowest, dtype), np.full((N, S), lowest, dtype), dtype=dtype)
    with np.errstate(over="ignore"):
        shown, bias = materialise(spec, (N,), H, L, S, dtype)
    assert shown.all()
    assert (bias == lowest).all()


def test_boolean_with_float_masks():
    pairs, padding = flags(L, S), floats(N, S)
    shown, bias = materialise(layer(pairs, padding), (N,), H, L, S)
    np.testing.assert_array_equal(shown, np.broadcast_to(~pairs, shown.shape))
    np.testing.assert_array_equal(bias[1, 2, 3][~pairs[3]], padding[1][~pairs[3]].astype(float))


@pytest.mark.parametrize("hidden", [[], [4], [3, 4], [0, 2], [0, 1, 2, 3, 4]])
def test_padding_true_ignores(hidden):
    padding = np.zeros((N, S), bool)
    padding[1, hidden] = True
    np.testing.assert_array_equal(visible(layer(None, padding))[:, 1, 2], ~padding)


@pytest.mark.parametrize("offset", [0, 2, -2, [1, -1]])
@pytest.mark.parametrize("window", [None, -1, 0, 2, (1, 1), (-1, 2), (2, -1), (0, 0), (-1, -1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_window_and_causality(window, is_causal, offset):
    left, right = window if isinstance(window, tuple) else (-1, -1) if window is None else (window, 0)
    expected = np.ones((N, 1, L, S), bool)
    for n, _, i, j in np.ndindex(expected.shape):
        position = i + (offset[n] if isinstance(offset, list) else offset)
        expected[n, 0, i, j] = (
            (left == -1 or j >= position - left)
            and (right == -1 or j <= position + right)
            and (not is_causal or j <= position)
        )
    given = np.array(offset) if isinstance(offset, list) else offset
    for build in (layer, product):
        spec = build(window=window, is_causal=is_causal, causal_offset=given)
        np.testing.assert_array_equal(visible(spec), np.broadcast_to(expected, (N, H, L, S)))


def test_causality_holds_with_other_masks():
    mask, padding = flags(L, S), flags(N, S)
    expected = np.tri(L, S, dtype=bool) & ~mask & ~padding[:, None, None, :]
    np.testing.assert_array_equal(
        visible(layer(mask, padding, is_causal=True)), np.broadcast_to(expected, (N, H, L, S))
    )


def test_lengths():
    shown = visible(product(key_lengths=np.array([0, 3], np.int32), query_lengths=[4, 2]))
    expected = np.zeros((N, H, L, S), bool)
    expected[1, :, :2, :3] = True
    np.testing.assert_array_equal(shown, expected)


def test_lengths_follow_the_flattened_batch():
    spec = product(batch_shape=(2, 3), key_lengths=np.arange(6) % 5)
    shown = visible(spec, batch_shape=(2, 3))
    np.testing.assert_array_equal(shown.sum(-1)[:, :, 0, 0], (np.arange(6) % 5).reshape(2, 3))


def test_appended_keys_are_visible_but_not_past_the_query_length():
    rows = np.array([[0] * L, [S, 0, 1, 2]])
    spec = layer(rows, np.array([[4, 3], [5, 0]]), maybe_cudnn_style_mask=True, is_causal=True, extra=2)
    shown = visible(spec)
    assert shown.shape == (N, H, L, S + 2)
    expected = np.zeros((N, L, S + 2), bool)
    expected[0, 0, 0] = expected[0, 2, 0] = True
    expected[0, 3, :2] = True
    expected[0, :, S:] = True
    expected[1, :3, S:] = True
    np.testing.assert_array_equal(shown, np.repeat(expected[:, None], H, 1))


def test_bias_of_appended_keys_is_zero():
    _, bias = materialise(layer(floats(L, S), extra=1), (N,), H, L, S)
    assert bias.shape == (N, H, L, S + 1)
    assert not bias[..., -1].any()


def test_cudnn_style_masks_take_any_integers():
    low, high = np.array([0, 1, 2, 5]), np.array([5, 3, 2, 5])
    spec = layer(np.stack([low, high]).astype(np.uint8), np.array([[4, 2], [5, 2]]), maybe_cudnn_style_mask=True)
    shown = visible(spec)
    for n, h, i, j in np.ndindex(shown.shape):
        assert shown[n, h, i, j] == (low[i] <= j < min(high[i], (5, 2)[n]) and i < (4, 2)[n])


def test_without_a_batch():
    sizes = {"batch": 1, "batched": False}
    assert visible(layer(flags(H, L, S), flags(S), **sizes), (1,)).shape == (1, H, L, S)
    np.testing.assert_array_equal(visible(layer(None, flags(S), **sizes), (1,))[0, 0, 0], ~flags(S))
    rows, lengths = np.array([[0] * L, [S] * L]), np.array([[2], [3]])
    assert visible(layer(rows, lengths, maybe_cudnn_style_mask=True, **sizes), (1,)).sum() == H * 2 * 3


@pytest.mark.parametrize("batch_shape", [(), (2,), (2, 1, 3), (0,)])
@pytest.mark.parametrize(("queries", "keys"), [(4, 5), (0, 5), (4, 0), (0, 0)])
def test_any_rank_and_size(batch_shape, queries, keys):
    samples = int(np.prod(batch_shape))
    spec = product(
        floats(queries, keys),
        batch_shape=batch_shape,
        queries=queries,
        keys=keys,
        is_causal=True,
        causal_offset=np.zeros(samples, int),
        key_lengths=np.full(samples, keys),
        query_lengths=[queries] * samples,
    )
    shown, bias = materialise(spec, batch_shape, H, queries, keys)
    assert shown.shape == bias.shape == (*batch_shape, H, queries, keys)


@pytest.mark.parametrize("swapped", [">f4", "<f4"])
def test_masks_that_kernels_cannot_index_are_copied(swapped):
    packed = np.zeros((L, S), [("flag", bool), ("value", swapped)])
    packed["value"], packed["flag"] = floats(L, S), flags(L, S)
    spec = layer(packed["value"], np.asfortranarray(floats(N, S)), dtype=swapped)
    assert spec.pair_bias.dtype.isnative
    assert spec.pair_bias.strides[-1] == 4
    assert spec.key_bias.flags.c_contiguous
    np.testing.assert_array_equal(spec.pair_bias[1, 2], floats(L, S))
    assert layer(None, np.asfortranarray(flags(N, S))).key_keep.flags.c_contiguous
    np.testing.assert_array_equal(visible(product(packed["flag"]))[1, 2], flags(L, S))


def test_half_precision_masks():
    for dtype in (np.dtype(np.float16), *([] if bfloat16 is None else [bfloat16])):
        mask = floats(L, S).astype(dtype)
        mask[0, 1] = -np.inf
        shown, bias = materialise(layer(mask, dtype=dtype), (N,), H, L, S)
        assert not shown[:, :, 0, 1].any()
        np.testing.assert_array_equal(bias[0, 0, 1:], mask[1:].astype(float))
        layer(mask.astype(np.float32), dtype=dtype)


@pytest.mark.parametrize("mask", [np.zeros((L, S), np.int64), np.zeros((L, S), np.uint8), np.zeros((L, S), complex)])
@pytest.mark.parametrize("build", [layer, product])
def test_other_dtypes_are_type_errors(build, mask):
    with pytest.raises(TypeError, match=rf"attn_mask has dtype {mask.dtype}.*query of dtype float32.*bool"):
        build(mask)


@pytest.mark.parametrize(("mask", "query"), [(np.float64, np.float32), (np.float16, np.float32), (np.float16, float)])
def test_foreign_floats_are_type_errors(mask, query):
    with pytest.raises(TypeError, match="astype"):
        layer(floats(L, S, dtype=mask), dtype=query)
    with pytest.raises(TypeError, match=f"key_padding_mask has dtype {np.dtype(mask)}"):
        layer(None, floats(N, S, dtype=mask), dtype=query)
    with pytest.raises(TypeError, match="True = attend"):
        product(floats(L, S, dtype=mask), dtype=query)


@pytest.mark.parametrize("shape", [(S,), (L, S - 1), (L, S + 1), (1, S), (N, L, S), (H, L, S), (3, 1, L, S), (2, L)])
def test_layer_mask_shapes(shape):
    with pytest.raises(ValueError, match=r"attn_mask has shape .*N=2, H=3, L=4, S=5.*\(6, 4, 5\).*\.$") as caught:
        layer(flags(*shape))
    assert str(shape) in str(caught.value)
    if shape == (N, L, S):
        assert "Reshape a mask per sample to (2, 1, 4, 5)" in str(caught.value)


@pytest.mark.parametrize("shape", [(S,), (L, S + 1), (N, L, S), (1, N, H, L, S)])
def test_product_mask_shapes(shape):
    with pytest.raises(ValueError, match=r"attn_mask has shape .*N=2, H=3, L=4, S=5.*\(2, 3, 4, 5\)"):
        product(flags(*shape))


@pytest.mark.parametrize("shape", [(S,), (1, S), (N, S + 1), (S, N), (N, 1, 1, S)])
def test_padding_shapes(shape):
    with pytest.raises(ValueError, match=r"key_padding_mask has shape .*N=2.*\(N, S\) = \(2, 5\)"):
        layer(None, flags(*shape))
    with pytest.raises(ValueError, match="no batch"):
        layer(None, flags(N, S), batch=1, batched=False)


def test_masks_must_be_arrays():
    with pytest.raises(TypeError, match="attn_mask is a list"):
        layer(flags(L, S).tolist())
    with pytest.raises(TypeError, match="key_padding_mask is a list"):
        layer(None, flags(N, S).tolist())


ROWS, SAMPLES = np.array([[0] * L, [S] * L]), np.array([[L] * N, [S] * N])


@pytest.mark.parametrize(
    ("rows", "samples", "error", "words"),
    [
        (None, SAMPLES, ValueError, "attn_mask is None"),
        (ROWS, None, ValueError, "key_padding_mask is None"),
        (None, None, ValueError, "attn_mask and key_padding_mask is None"),
        (ROWS.astype(float), SAMPLES, TypeError, "attn_mask has dtype float64"),
        (ROWS, SAMPLES.astype(bool), TypeError, "key_padding_mask has dtype bool"),
        (ROWS[:, 1:], SAMPLES, ValueError, r"\(2, L\) = \(2, 4\)"),
        (ROWS, SAMPLES[:1], ValueError, r"\(2, N\) = \(2, 2\)"),
        (ROWS + 1, SAMPLES, ValueError, "S = 5"),
        (ROWS[::-1], SAMPLES, ValueError, "0 <= first <= end"),
        (ROWS - 1, SAMPLES, ValueError, "0 <= first"),
        (ROWS, SAMPLES + np.array([[1], [0]]), ValueError, r"key_padding_mask\[0\] has values outside 0 to 4"),
        (ROWS, SAMPLES + np.array([[0], [1]]), ValueError, r"key_padding_mask\[1\] has values outside 0 to 5"),
    ],
)
def test_cudnn_style_refusals(rows, samples, error, words):
    with pytest.raises(error, match=words):
        layer(rows, samples, maybe_cudnn_style_mask=True)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"window": -2}, ValueError, "below -1"),
        ({"window": (1, 2, 3)}, ValueError, "3 numbers"),
        ({"window": 1.0}, TypeError, "window is 1.0"),
        ({"window": True}, TypeError, "window is True"),
        ({"window": (1, None)}, TypeError, r"window\[1\]"),
        ({"causal_offset": 0.5}, TypeError, "causal_offset is 0.5"),
        ({"causal_offset": np.zeros(3, int)}, ValueError, r"causal_offset has shape \(3,\)"),
        ({"causal_offset": np.zeros(2)}, TypeError, "causal_offset has dtype float64"),
        ({"key_lengths": 3}, TypeError, "key_lengths is a int"),
        ({"key_lengths": [1, 6]}, ValueError, "key_lengths has values outside 0 to 5"),
        ({"query_lengths": [-1, 0]}, ValueError, "query_lengths has values outside 0 to 4"),
        ({"query_lengths": [1]}, ValueError, r"query_lengths has shape \(1,\)"),
    ],
)
def test_number_refusals(options, error, words):
    with pytest.raises(error, match=words):
        product(**options)


def test_whether_windows_leave_a_position_out() -> None:
    """Against the mask written out, for every window and offset of small sizes."""
    seen = set()
    for queries, keys in itertools.product((1, 2, 4), repeat=2):
        for left, right, offset in itertools.product((-1, 0, 1, 3), (-1, 0, 2), (-3, -1, 0, 1, 4)):
            spec = MaskSpec(left=left, right=right, offset=offset)
            seen_by, _ = materialise(spec, (), 1, queries, keys)
            complete = seen_by.any(axis=-1).all() and seen_by.any(axis=-2).all()
            assert spec.may_leave_out(queries, keys) == (not complete), (queries, keys, spec)
            seen.add(bool(complete))
    assert seen == {True, False}
    assert MaskSpec(query_lengths=np.array([2])).may_leave_out(2, 2)
    assert MaskSpec().may_leave_out(0, 2)


@pytest.mark.parametrize("shape", [(3, 1, 1, 7), (1, 1, 1, 7), (1, 1, 7), (1, 7), (3, 1, 1, 1)])
def test_one_row_for_all_queries_is_padding(shape: tuple[int, ...]) -> None:
    """Its hidden keys are passed over whole."""
    mask = np.random.default_rng(0).random(shape) < 0.5
    sizes = dict(batch_shape=(3,), heads=2, queries=4, keys=7, dtype=np.float32)
    spec = for_scaled_dot_product(mask, **sizes)
    assert spec.pair_keep is None
    np.testing.assert_array_equal(spec.key_keep, np.broadcast_to(mask, (3, 1, 4, 7))[:, 0, 0])
    visible, _ = materialise(spec, (3,), 2, 4, 7)
    np.testing.assert_array_equal(visible, np.broadcast_to(mask, (3, 2, 4, 7)))
    per_head = np.broadcast_to(mask, (3, 2, 1, 7)).copy()
    assert for_scaled_dot_product(per_head, **sizes).key_keep is None
