"""Bad calls: ValueError for shapes, sizes and flags, TypeError for types and dtypes; the text names what it met."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mha

N, L, S, E, H = 2, 3, 4, 8, 2
RECORDED = json.loads((Path(__file__).parent / "data" / "megengine" / "errors.json").read_text())


def x(*shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def call(**changes: Any) -> Any:
    """The call that all of MegEngine's recorded bad calls vary."""
    given: dict[str, Any] = dict(
        query=x(N, L, E), key=x(N, S, E), value=x(N, S, E), embed_dim=E, num_heads=H, attn_drop=0.0, out_drop=0.0,
        io_weight_bias=x(4 * E * E), training=False,
    )  # fmt: skip
    return mha.multi_head_attention(**(given | changes))


def integers(*shape: int) -> Any:
    return np.zeros(shape, np.int32)


#: MegEngine's bad calls: arguments, the error, and what its text must contain.
BAD: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "query_4d": (dict(query=x(1, N, L, E)), ValueError, ["(1, 2, 3, 8)", "(2, 4, 8)"]),
    "batch_mismatch": (dict(key=x(1, S, E), value=x(1, S, E)), ValueError, ["(2, 3, 8)", "(1, 4, 8)"]),
    "key_value_len_mismatch": (dict(value=x(N, 2, E)), ValueError, ["(2, 4, 8)", "(2, 2, 8)"]),
    "attn_mask_int": (dict(attn_mask=integers(L, S)), TypeError, ["attn_mask", "int32"]),
    "attn_mask_float16_for_float32": (dict(attn_mask=x(L, S, dtype=np.float16)), TypeError, ["float16", "float32"]),
    "attn_mask_2d_wrong_shape": (dict(attn_mask=x(L, S - 1)), ValueError, ["(3, 3)", "(3, 4)"]),
    "attn_mask_2xL_without_cudnn_flag": (dict(attn_mask=x(2, L)), ValueError, ["(2, 3)", "(3, 4)", "cudnn"]),
    "attn_mask_3d_wrong_shape": (dict(attn_mask=x(N, L, S)), ValueError, ["(2, 3, 4)", "(4, 3, 4)"]),
    "attn_mask_1d": (dict(attn_mask=x(S)), ValueError, ["(4,)", "(3, 4)"]),
    "kpm_wrong_shape": (dict(key_padding_mask=x(N, S + 1)), ValueError, ["(2, 5)", "(2, 4)"]),
    "kpm_1d": (dict(key_padding_mask=x(S)), ValueError, ["(4,)", "(2, 4)"]),
    "cudnn_style_without_masks": (dict(maybe_cudnn_style_mask=True), ValueError, ["attn_mask", "key_padding_mask"]),
    "cudnn_style_wrong_shapes": (
        dict(maybe_cudnn_style_mask=True, attn_mask=integers(L, S), key_padding_mask=integers(N, S)),
        ValueError, ["(3, 4)", "(2, 3)"],
    ),
    "weights_none": (dict(io_weight_bias=None), TypeError, ["io_weight_bias"]),
    "weights_too_short": (dict(io_weight_bias=x(4 * E * E - 1)), ValueError, ["255", "256"]),
    "weights_too_long": (dict(io_weight_bias=x(4 * E * E + 1)), ValueError, ["257", "256"]),
    "embed_dim_not_query_dim": (dict(embed_dim=16, io_weight_bias=x(1024)), ValueError, ["(2, 3, 8)", "16"]),
    "qbias_without_qproj": (dict(qproj_size=0, qbias=True), ValueError, ["qbias", "qproj_size"]),
    "kbias_without_kproj": (dict(kproj_size=0, kbias=True), ValueError, ["kbias", "kproj_size"]),
    "vbias_without_vproj": (dict(vproj_size=0, vbias=True), ValueError, ["vbias", "vproj_size"]),
    "obias_without_oproj": (dict(oproj_size=0, obias=True), ValueError, ["obias", "oproj_size"]),
    "qproj_ne_kproj": (dict(qproj_size=8, kproj_size=4, io_weight_bias=x(224)), ValueError, ["qproj_size 8", "4"]),
    "heads_do_not_divide": (dict(num_heads=3), ValueError, ["8", "3"]),
    "num_heads_zero": (dict(num_heads=0), ValueError, ["num_heads", "0"]),
    "negative_proj": (dict(qproj_size=-1), ValueError, ["qproj_size", "-1"]),
    "int_inputs": (
        dict(query=integers(N, L, E), key=integers(N, S, E), value=integers(N, S, E), io_weight_bias=integers(256)),
        TypeError, ["int32", "float32"],
    ),
    "mixed_float16_query": (dict(query=x(N, L, E, dtype=np.float16)), TypeError, ["float16", "float32", "(2, 3, 8)"]),
    "bias_k": (dict(bias_k=x(1, 1, E)), ValueError, ["bias_k", "bias_v"]),
    "bias_v": (dict(bias_v=x(1, 1, E)), ValueError, ["bias_k", "bias_v"]),
}  # fmt: skip

#: MegEngine's bad calls that work here.
GOOD: dict[str, dict[str, Any]] = {
    "unbatched_2d_inputs": dict(query=x(L, E), key=x(S, E), value=x(S, E)),
    "is_causal_without_mask_on_cpu": dict(is_causal=True),
    "key_len_zero": dict(key=x(N, 0, E), value=x(N, 0, E)),
    "add_zero_attn": dict(add_zero_attn=True),
    "add_zero_attn_is_0": dict(add_zero_attn=0),
    "reslink": dict(reslink=True),
}


def check_text(error: pytest.ExceptionInfo[Exception], parts: list[str]) -> None:
    text = str(error.value)
    assert all(part in text for part in parts), text
    assert text.rstrip().endswith("."), text
    assert text.count(". ") >= 1 or ": " in text, f"no hint: {text}"


def test_every_recorded_bad_call_is_here() -> None:
    assert sorted([*BAD, *GOOD]) == sorted(RECORDED)


@pytest.mark.parametrize("name", BAD)
def test_megengines_bad_calls_raise(name: str) -> None:
    arguments, error, parts = BAD[name]
    with pytest.raises(error) as caught:
        call(**arguments)
    check_text(caught, parts)


@pytest.mark.parametrize("name", GOOD)
def test_what_megengine_refuses_works(name: str) -> None:
    result = call(**GOOD[name])
    query = GOOD[name].get("query", x(N, L, E))
    assert result.attn_output.shape == query.shape
    assert np.isfinite(result.attn_output).all()
    if name == "key_len_zero":
        assert (result.attn_output == 0).all()


Q, K, V = x(2, 4, 5, 8), x(2, 4, 7, 8), x(2, 4, 7, 6)
sdpa = mha.scaled_dot_product_attention


def backward(**changes: Any) -> Any:
    output, lse = sdpa(Q, K, V, return_lse=True)
    given = dict(grad_output=output, query=Q, key=K, value=V, output=output, lse=lse) | changes
    return mha.scaled_dot_product_attention_backward(**given)


CORE: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "one_axis": (lambda: sdpa(Q[0, 0, 0], K, V), ValueError, ["(8,)", "(2, 4, 7, 8)"]),
    "head_size": (lambda: sdpa(Q, K[..., :7], V), ValueError, ["(2, 4, 5, 8)", "(2, 4, 7, 7)"]),
    "length": (lambda: sdpa(Q, K, V[:, :, :6]), ValueError, ["(2, 4, 7, 8)", "(2, 4, 6, 6)"]),
    "batch": (lambda: sdpa(Q, x(3, 4, 7, 8), x(3, 4, 7, 6)), ValueError, ["(2,)", "(3,)"]),
    "heads_without_gqa": (lambda: sdpa(Q, K[:, :2], V[:, :2]), ValueError, ["enable_gqa", "(2, 2, 7, 8)"]),
    "heads_no_divisor": (lambda: sdpa(Q, K[:, :3], V[:, :3], enable_gqa=True), ValueError, ["(2, 3, 7, 8)"]),
    "list": (lambda: sdpa(Q.tolist(), K, V), TypeError, ["list"]),
    "complex": (lambda: sdpa(Q.astype(complex), K, V), TypeError, ["complex128"]),
    "mixed": (lambda: sdpa(Q, K.astype("f8"), V), TypeError, ["float32", "float64"]),
    "int_mask": (lambda: sdpa(Q, K, V, integers(5, 7)), TypeError, ["int32"]),
    "mask_shape": (lambda: sdpa(Q, K, V, x(5, 6)), ValueError, ["(5, 6)", "(2, 4, 5, 7)"]),
    "mask_1d": (lambda: sdpa(Q, K, V, x(7)), ValueError, ["(7,)"]),
    "dropout": (lambda: sdpa(Q, K, V, dropout_p=1.5), ValueError, ["1.5"]),
    "dropout_nan": (lambda: sdpa(Q, K, V, dropout_p=float("nan")), ValueError, ["nan"]),
    "scale": (lambda: sdpa(Q, K, V, scale=float("inf")), ValueError, ["inf"]),
    "softcap": (lambda: sdpa(Q, K, V, softcap=0.0), ValueError, ["softcap"]),
    "window": (lambda: sdpa(Q, K, V, window=(-2, 0)), ValueError, ["window"]),
    "window_type": (lambda: sdpa(Q, K, V, window=1.5), TypeError, ["window"]),
    "lengths_range": (lambda: sdpa(Q, K, V, key_lengths=np.array([8, 1])), ValueError, ["key_lengths"]),
    "lengths_shape": (lambda: sdpa(Q, K, V, key_lengths=np.array([1, 1, 1])), ValueError, ["(3,)"]),
    "grad_shape": (lambda: backward(grad_output=Q), ValueError, ["(2, 4, 5, 8)", "(2, 4, 5, 6)"]),
    "grad_dtype": (lambda: backward(grad_output=x(2, 4, 5, 6, dtype="f8")), TypeError, ["float64", "float32"]),
    "lse_shape": (lambda: backward(lse=x(2, 4, 4)), ValueError, ["(2, 4, 4)", "(2, 4, 5)"]),
    "no_state": (lambda: backward(dropout_p=0.5), ValueError, ["dropout_state"]),
}


@pytest.mark.parametrize("name", CORE)
def test_bad_calls_of_the_core_raise(name: str) -> None:
    bad, error, parts = CORE[name]
    with pytest.raises(error) as caught:
        bad()
    check_text(caught, parts)


def test_absurd_sizes_raise_before_anything_is_allocated() -> None:
    huge = np.broadcast_to(np.float32(0), (2**29, 2**28, 8))
    with pytest.raises(ValueError, match="64-bit"):
        sdpa(huge, huge, huge)


@pytest.mark.parametrize(("forced", "message"), [("gpu", "not compute on numpy arrays"), ("tpu", "is none of cpu")])
def test_a_backend_that_cannot_be_forced(forced: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.ones((2, 3, 4), np.float32)
    layer = mha.MultiHeadAttention(4, 2)
    monkeypatch.setenv("MHA_BACKEND", forced)
    with pytest.raises(RuntimeError, match=message):
        mha.scaled_dot_product_attention(x, x, x)
    with pytest.raises(RuntimeError, match=message):
        layer(x, x, x)
