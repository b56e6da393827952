"""Hidden keys leak nothing, NaN and infinity included, forward and backward; finite input gives no NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mha

N, H, L, S, D = 2, 3, 70, 150, 24


def normal(*shape: int, dtype: Any = np.float32, salt: int = 0) -> Any:
    return np.random.default_rng([*shape, salt]).standard_normal(shape).astype(dtype)


def hiding(name: str) -> tuple[dict[str, Any], Any]:
    """Options, and which pairs (N, L, S) they hide."""
    i, j = np.arange(L)[:, None], np.arange(S)
    if name == "causal":
        return {"is_causal": True}, np.broadcast_to(j > i, (N, L, S))
    if name == "window":
        return {"window": (20, 5)}, np.broadcast_to((j < i - 20) | (j > i + 5), (N, L, S))
    if name == "lengths":
        lengths = np.array([90, 17])
        return {"key_lengths": lengths}, np.broadcast_to(j >= lengths[:, None, None], (N, L, S))
    keep = np.random.default_rng(1).random((L, S)) < 0.6
    keep[:, 40] = False
    mask = keep if name == "bool" else np.where(keep, 0, -np.inf).astype(np.float32)
    return {"attn_mask": mask}, np.broadcast_to(~keep, (N, L, S))


def everything(q: Any, k: Any, v: Any, g: Any, options: dict[str, Any]) -> list[Any]:
    output, lse = mha.scaled_dot_product_attention(q, k, v, return_lse=True, **options)
    return [output, lse, *mha.scaled_dot_product_attention_backward(g, q, k, v, output, lse, **options)[:3]]


@pytest.mark.parametrize("threads", [1, 8], ids=["fused", "separate"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["causal", "window", "lengths", "bool", "float"])
@pytest.mark.parametrize("queries", [L, 3], ids=["forward", "decode"])
def test_keys_hidden_from_a_row_leave_it_alone(
    name: str, poison: float, threads: int, queries: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One poisoned key: rows that do not see it, and keys those rows alone see, keep their bits."""
    monkeypatch.setattr("mha.cpu.plan._SMALL_WORK", 0)
    options, hidden = hiding(name)
    hidden = hidden[:, :queries]
    if "attn_mask" in options:
        options = {"attn_mask": options["attn_mask"][:queries]}
    q, k, v, g = normal(N, H, queries, D), normal(N, H, S, D), normal(N, H, S, D), normal(N, H, queries, D)
    bad = 40
    poisoned_k, poisoned_v = k.copy(), v.copy()
    poisoned_k[:, :, bad] = poisoned_v[:, :, bad] = poison
    # Rows that see the poisoned key are lost; their gradients are zero here so that they do not spread.
    blind = hidden[:, :, bad]
    g = np.where(blind[:, None, :, None], g, 0).astype(np.float32)
    mha.set_num_threads(threads)
    try:
        clean = everything(q, k, v, g, options)
        found = everything(q, poisoned_k, poisoned_v, g, options)
    finally:
        mha.set_num_threads(None)
    assert blind.any(), "nothing is tested"
    for n in range(N):
        rows = blind[n]
        for one, other in zip(found[:3], clean[:3], strict=True):
            np.testing.assert_allclose(one[n][:, rows], other[n][:, rows], atol=1e-6)
            assert np.isfinite(one[n][:, rows]).all() or one.ndim == 3
        if rows.all():
            for one, other in zip(found[3:], clean[3:], strict=True):
                np.testing.assert_allclose(np.delete(one[n], bad, 1), np.delete(other[n], bad, 1), atol=1e-6)
                assert (one[n][:, bad] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_padding_hides_whatever_lies_there(dtype: Any, level: str) -> None:
    """Keys that a sample does not have are never read: layers with poisoned padding give the clean ones' bits."""
    layer = mha.MultiHeadAttention(24, 3, dtype=dtype)
    x = normal(N, 40, 24, dtype=dtype)
    padding = np.zeros((N, 40), bool)
    padding[0, 25:] = padding[1, 7:9] = padding[1, 33:] = True
    poisoned = x.copy()
    poisoned[padding] = np.nan
    results = []
    for key in (x, poisoned):
        output, weights = layer(x, key, key, key_padding_mask=padding, need_weights=True)
        gradients = layer.backward(np.ones_like(output))
        results.append([output, weights, *gradients[:4]])
        assert all(np.isfinite(array).all() for array in results[-1])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_finite_input_gives_no_nan(size: float, level: str) -> None:
    """Scores of the given size, of either sign."""
    q, k, v, g = (normal(1, 2, 50, 16, salt=i) for i in range(4))
    q *= size / np.abs(q @ k.swapaxes(-1, -2) / 4).max()
    found = everything(q, k, v, g, {})
    assert all(np.isfinite(x).all() for x in found)
    np.testing.assert_allclose(found[0].max(), mha.scaled_dot_product_attention(
        *(x.astype(np.float64) for x in (q, k, v))).max(), rtol=1e-3)  # fmt: skip


def test_denormal_probabilities_are_zero(level: str) -> None:
    """They would slow the product behind them by a factor of six."""
    q, k = np.ones((1, 1, 20, 1), np.float32), np.zeros((1, 1, 64, 1), np.float32)
    k[..., 0, 0] = 95.0
    mask = np.zeros((20, 64), bool)
    problem_weights = mha.multi_head_attention(
        q[0, 0][None], k[0, 0][None], k[0, 0][None], 1, 1, 0.0, 0.0, np.zeros(0, np.float32), 0, 0, 0, 0,
        attn_mask=mask, need_weights=True,
    ).attn_output_weights  # fmt: skip
    assert (problem_weights[..., 1:] == 0).all()
    assert (problem_weights[..., 0] == 1).all()
