"""The reference implementation: against PyTorch's recorded results, central differences and its own rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mha.masks import MaskSpec, for_multi_head_attention, for_scaled_dot_product
from mha.optional import bfloat16
from mha.random import attention_keep, output_keep
from mha.reference import attention_backward, attention_forward, output_dropout

RECORDED = sorted((Path(__file__).parent / "data" / "torch").glob("s*.npz"))
STATE = (0xDEADBEEF12345678, 3)
F32_MIN = np.finfo(np.float32).min
HALF_TYPES = [np.dtype(np.float16), *([] if bfloat16 is None else [bfloat16])]


def inputs(batch=(2,), heads=4, kv_heads=2, queries=3, keys=5, width=4, v_width=3, dtype=np.float64, seed=0):
    """Random query, key, value and output gradient."""
    rng = np.random.default_rng(seed)
    shapes = [
        (heads, queries, width),
        (kv_heads, keys, width),
        (kv_heads, keys, v_width),
        (heads, queries, v_width),
    ]
    return [rng.standard_normal((*batch, *shape)).astype(dtype) for shape in shapes]


def mask_like(query, key, attn_mask=None, **options) -> MaskSpec:
    *batch, heads, queries, _ = query.shape
    sizes = {"batch_shape": tuple(batch), "heads": heads, "queries": queries, "keys": key.shape[-2]}
    return for_scaled_dot_product(attn_mask, dtype=query.dtype, **sizes, **options)


def both(q, k, v, g, mask=None, **options):
    """Forward and backward results in one tuple of 7."""
    forward = attention_forward(q, k, v, mask, scale=0.4, **options)
    return *forward, *attention_backward(g, q, k, v, mask, scale=0.4, **options)


def central_difference(loss, x, step=1e-5):
    """Gradient of a scalar function at `x`, which is changed in place and restored."""
    gradient = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        middle = x[at]
        x[at] = middle + step
        above = loss()
        x[at] = middle - step
        gradient[at] = (above - loss()) / (2 * step)
        x[at] = middle
    return gradient


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.stem)
def test_agrees_with_recorded_torch(path):
    case = dict(np.load(path))
    meta = json.loads(str(case.pop("meta")))
    call = meta["call"]
    heads_first = [case[f"in/{n}"] for n in ("query", "key", "value")] + [case["up/output"]]
    q, k, v, g = (x if x.ndim > 2 else x[None] for x in heads_first)
    mask = mask_like(q, k, case.get("in/attn_mask"), is_causal=call.get("is_causal", False))
    scale = call.get("scale", q.shape[-1] ** -0.5)
    output = attention_forward(q, k, v, mask, scale=scale)[0]
    *gradients, scores = attention_backward(g, q, k, v, mask, scale=scale)
    results = {"out/output": output} | {
        f"grad/{n}": x for n, x in zip(("query", "key", "value"), gradients, strict=True)
    }
    if "grad/attn_mask" in case:
        results["grad/attn_mask"] = scores.sum((0, 1))
    for name, result in results.items():
        expected = case[name]
        assert result.dtype == expected.dtype
        np.testing.assert_allclose(result.reshape(expected.shape), expected, meta["rtol"], meta["atol"], err_msg=name)


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 0.7},
    "dropout": {"dropout_p": 0.4, "keep": np.random.default_rng(5).random((2, 4, 3, 7)) < 0.6},
    "state and softcap": {"dropout_p": 0.3, "dropout_state": STATE, "softcap": 1.5},
}


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_central_differences(options, with_weights):
    q, k, v, g = inputs(keys=7)
    rng = np.random.default_rng(1)
    grad_weights = rng.standard_normal((2, 4, 3, 7)) if with_weights else None
    bias = rng.standard_normal((2, 4, 3, 5))
    bias[0, 1, 0] = -np.inf
    bias[1, 2, 1, 3:] = -np.inf
    sizes = {"batch": 2, "heads": 4, "queries": 3, "keys": 5, "extra": 2, "dtype": q.dtype}
    mask = for_multi_head_attention(bias, None, is_causal=True, causal_offset=np.array([0, 2]), **sizes)

    def loss():
        output, _, weights = attention_forward(q, k, v, mask, scale=0.4, **options)
        return (output * g).sum() + (0 if grad_weights is None else (weights * grad_weights).sum())

    *gradients, scores = attention_backward(g, q, k, v, mask, scale=0.4, grad_weights=grad_weights, **options)
    for x, gradient in zip((q, k, v, bias), (*gradients, scores[..., :5]), strict=True):
        with np.errstate(invalid="ignore"):
            expected = central_difference(loss, x)
        expected[~np.isfinite(x)] = 0
        assert np.abs(gradient - expected).max() <= 1e-6 * np.abs(expected).max()


def test_broadcast_batches_and_separate_head_counts():
    q, k, v, g = inputs(batch=(3, 1, 2))
    k, v = k[0], np.repeat(v[:1, :, :1], 2, axis=-3)[..., :4, :, :]
    output, lse, weights, dq, dk, dv, scores = both(q, k, v, np.broadcast_to(g, (3, 1, 2, 4, 3, 3)))
    full = [np.broadcast_to(x, (3, 1, 2, *x.shape[-3:])) for x in (k, v)]
    full[0] = np.repeat(full[0], 2, axis=-3)
    for n in np.ndindex(3, 1, 2):
        for h in range(4):
            s = 0.4 * q[n][h] @ full[0][n][h].T
            np.testing.assert_allclose(lse[n][h], np.log(np.exp(s).sum(-1)))
            np.testing.assert_allclose(weights[n][h], np.exp(s - lse[n][h][:, None]))
            np.testing.assert_allclose(output[n][h], weights[n][h] @ full[1][n][h])
    assert dq.shape == q.shape
    assert dk.shape == (3, 1, 2, 2, 5, 4)
    assert dv.shape == (3, 1, 2, 4, 5, 3)
    assert scores.shape == weights.shape


@pytest.mark.parametrize("batch", [(), (0,), (2, 1, 2)])
@pytest.mark.parametrize(("queries", "keys"), [(3, 0), (0, 5), (0, 0), (3, 5)])
def test_any_rank_and_size(batch, queries, keys):
    q, k, v, g = inputs(batch=batch, queries=queries, keys=keys)
    mask = mask_like(q, k, np.zeros((queries, keys)), is_causal=True)
    output, lse, weights, dq, dk, dv, scores = both(q, k, v, g, mask, softcap=2.0, dropout_p=0.5, dropout_state=STATE)
    assert output.shape == g.shape
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    assert scores.shape == weights.shape == (*batch, 4, queries, keys)
    if keys == 0:
        assert not output.any()
        assert (lse == -np.inf).all()


EMPTY_ROW_MASKS = {
    "boolean": {"attn_mask": np.array([[True] * 5, [False] * 5, [True] * 5])},
    "float": {"attn_mask": np.where(np.arange(3)[:, None] == 1, -np.inf, np.zeros((3, 5)))},
    "causal": {"is_causal": True, "causal_offset": -2},
    "window": {"window": (0, 0), "causal_offset": 4},
    "key length": {"key_lengths": [0, 5]},
    "query length": {"query_lengths": [1, 2]},
}


@pytest.mark.parametrize("options", EMPTY_ROW_MASKS.values(), ids=EMPTY_ROW_MASKS)
def test_rows_without_keys_are_zero(options):
    q, k, v, g = inputs()
    results = both(q, k, v, g, mask_like(q, k, **options))
    output, lse, weights, dq, dk, dv, scores = results
    empty = lse == -np.inf
    assert 0 < empty.sum() < empty.size
    assert not any(x[empty].any() for x in (output, weights, dq, scores))
    assert all(np.isfinite(x).all() for x in (output, weights, dq, dk, dv, scores))
    np.testing.assert_allclose(weights[~empty].sum(-1), 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_of_finite_minima_are_uniform(dtype):
    q, k, v, _ = inputs(dtype=np.float32)
    q, padding = q * 10, np.zeros((2, 5), np.float32)
    padding[1, 2:] = F32_MIN
    pairs = np.full((3, 5), F32_MIN)
    mask = for_multi_head_attention(pairs, padding, batch=2, heads=4, queries=3, keys=5, dtype=q.dtype)
    output, lse, weights = attention_forward(q, k, v, mask, scale=1.0, dtype=dtype)
    np.testing.assert_allclose(weights, 0.2, rtol=1e-6)
    np.testing.assert_allclose(output[:, ::2], np.broadcast_to(v.mean(-2, keepdims=True), (2, 2, 3, 3)), rtol=1e-4)
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"softcap": 0.5}, {"dropout_p": 0.5, "dropout_state": STATE}], ids=str)
def test_keys_hidden_from_everyone_leak_nothing(poison, options):
    q, k, v, g = inputs()
    mask = mask_like(q, k, key_lengths=[3, 5], query_lengths=[3, 2])
    clean = both(q, k, v, g, mask, **options)
    k[0, :, 3:] = v[0, :, 3:] = poison
    q[1, :, 2:] = g[1, :, 2:] = poison
    for expected, result in zip(clean, both(q, k, v, g, mask, **options), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["boolean", "float", "causal"])
def test_partly_hidden_keys_leak_nothing_to_rows_that_do_not_see_them(poison, kind):
    q, k, v, g = inputs(kv_heads=4)
    sees = np.tri(3, 5, dtype=bool)
    options = {
        "boolean": {"attn_mask": sees},
        "float": {"attn_mask": np.where(sees, 0, -np.inf)},
        "causal": {"is_causal": True},
    }[kind]
    mask = mask_like(q, k, **options)
    clean = both(q, k, v, g, mask)
    k[..., 2, :] = v[..., 2, :] = poison
    poisoned = both(q, k, v, g, mask)
    for expected, result in zip(clean[:4], poisoned[:4], strict=True):
        np.testing.assert_allclose(result[:, :, :2], expected[:, :, :2], rtol=1e-12, atol=1e-15)
    assert not np.isfinite(poisoned[0][:, :, 2]).any()
    np.testing.assert_allclose(poisoned[6][:, :, :2], clean[6][:, :, :2], rtol=1e-12, atol=1e-15)
    assert not any(x[:, :, 3:].any() for x in poisoned[4:6])


def test_poisoned_queries_leak_nothing_to_keys_they_do_not_see():
    q, k, v, g = inputs()
    mask = mask_like(q, k, window=(0, 0), causal_offset=[0, 2])
    clean = both(q, k, v, g, mask)
    q[:, 0, 1], g[:, 0, 1] = np.nan, np.inf
    poisoned = both(q, k, v, g, mask)
    for sample, seen in enumerate((1, 3)):
        for expected, result in zip(clean[4:6], poisoned[4:6], strict=True):
            unseen = np.arange(5) != seen
            np.testing.assert_array_equal(result[sample][:, unseen], expected[sample][:, unseen])
            assert not np.isfinite(result[sample, 0, seen]).any()
        assert not poisoned[6][sample, 0, 1, np.arange(5) != seen].any()


def test_poisoned_hidden_bias_and_weight_gradient_leak_nothing():
    q, k, v, g = inputs()
    mask = mask_like(q, k, is_causal=True)
    rng = np.random.default_rng(2)
    grad_weights = rng.standard_normal((2, 4, 3, 5))
    clean = attention_backward(g, q, k, v, mask, scale=0.4, grad_weights=grad_weights)
    grad_weights[..., np.triu(np.ones((3, 5), bool), 1)] = np.nan
    for expected, result in zip(
        clean, attention_backward(g, q, k, v, mask, scale=0.4, grad_weights=grad_weights), strict=True
    ):
        np.testing.assert_array_equal(result, expected)


def test_dropout_state_means_its_keep_mask():
    q, k, v, g = inputs(batch=(2, 3))
    keep = attention_keep(STATE, 0.3, 6, 4, 3, 5).reshape(2, 3, 4, 3, 5)
    from_state = both(q, k, v, g, dropout_p=0.3, dropout_state=STATE)
    from_mask = both(q, k, v, g, dropout_p=0.3, keep=keep)
    for one, other in zip(from_state, from_mask, strict=True):
        np.testing.assert_array_equal(one, other)
    plain = both(q, k, v, g)
    np.testing.assert_allclose(from_state[2], np.where(keep, plain[2] / 0.7, 0))
    np.testing.assert_array_equal(from_state[1], plain[1])


def test_everything_dropped():
    q, k, v, g = inputs()
    output, _, weights, *gradients = both(q, k, v, g, dropout_p=1.0, dropout_state=STATE)
    assert not any(x.any() for x in (output, weights, *gradients))


def test_output_dropout():
    x = np.random.default_rng(0).standard_normal((2, 3, 10)).astype(np.float32)
    keep = output_keep(STATE, 0.25, 2, 3, 10)
    dropped = output_dropout(x, 0.25, STATE)
    assert dropped.dtype == x.dtype
    np.testing.assert_allclose(dropped, np.where(keep, x / 0.75, 0), rtol=1e-6)
    np.testing.assert_array_equal(output_dropout(x, 0.25, keep=keep), dropped)
    np.testing.assert_array_equal(output_dropout(x[0], 0.25, STATE), dropped[0])
    assert not output_dropout(x, 1.0, STATE).any()
    np.testing.assert_array_equal(output_dropout(x, 0.0), x)


def test_dropout_without_randomness_is_refused():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=r"dropout_p=0.5 .* Pass dropout_state or keep\."):
        attention_forward(q, k, v, None, scale=1.0, dropout_p=0.5)
    with pytest.raises(ValueError, match="neither a state nor a mask"):
        output_dropout(q[0], 0.5)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_half_precision_computes_in_float32(dtype):
    arrays = [x.astype(dtype) for x in inputs()]
    mask = mask_like(*arrays[:2], np.where(np.tri(3, 5), 0, -np.inf).astype(dtype))
    wide = both(*(x.astype(np.float32) for x in arrays), mask)
    half = both(*arrays, mask)
    for number, (one, other) in enumerate(zip(wide, half, strict=True)):
        assert other.dtype == (np.float32 if number in (1, 6) else dtype)
        np.testing.assert_array_equal(one.astype(other.dtype), other)


def test_byte_order_does_not_matter():
    arrays = inputs()
    for one, other in zip(both(*arrays), both(*(x.astype(">f8") for x in arrays)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_sets_the_precision(dtype):
    arrays = inputs(dtype=np.float32)
    results = both(*arrays, dtype=dtype, softcap=np.float64(2.0), dropout_p=np.float64(0.5), dropout_state=STATE)
    assert all(x.dtype == dtype for x in results)


def test_inputs_are_left_alone():
    arrays = inputs()
    copies = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    both(*arrays, softcap=1.0)
    for x, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
