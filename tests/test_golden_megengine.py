"""Every recorded case of the real MegEngine 1.13.0: outputs, weights and all gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from devices import Device
from recorded_megengine import DECIDED, NAMES, Recorded, cases

import mha
from mha.functional import MultiHeadAttentionGradients
from mha.packed_call import PackedCall
from mha.problem import Dropout


def run(case: Recorded, **changes: Any) -> tuple[Any, Any, MultiHeadAttentionGradients | None]:
    result = mha.multi_head_attention(**(case.arguments() | changes))
    gradients = None
    if case.params["training"]:
        gradients = mha.multi_head_attention_backward(case.inputs["dout"], result)
    return result.attn_output, result.attn_output_weights, gradients


def run_with_recorded_masks(case: Recorded) -> tuple[Any, Any, MultiHeadAttentionGradients]:
    """Through the reference, which takes the keep masks themselves."""
    neutral = dict(num_kv_heads=None, scale=None, window=None, softcap=None, causal_offset=0)
    call = PackedCall.build(**(case.arguments() | neutral))
    weights, output = case.keep_masks()
    p = case.params
    call.call = replace(
        call.call,
        dropout=Dropout(p["attn_drop"], keep=weights) if p["attn_drop"] else None,
        output_dropout=Dropout(p["out_drop"], keep=output) if p["out_drop"] else None,
    )
    out, attn_weights = call.forward()
    gradients = call.backward(case.inputs["dout"], None, False)
    return out, attn_weights, MultiHeadAttentionGradients(*gradients)


def check(case: Recorded, out: Any, weights: Any, gradients: MultiHeadAttentionGradients | None) -> None:
    forward, backward = case.tolerance
    np.testing.assert_allclose(out, case.outputs["out"], atol=forward, rtol=forward)
    np.testing.assert_allclose(weights, case.outputs["attn_weights"], atol=forward, rtol=forward)
    if gradients is None:
        return
    found = {"dq": gradients.query, "dk": gradients.key, "dv": gradients.value, "dw": gradients.io_weight_bias,
             "dbias_k": gradients.bias_k, "dbias_v": gradients.bias_v}  # fmt: skip
    compared = 0
    for name, gradient in found.items():
        if name in case.outputs:
            expected = case.outputs[name].reshape(gradient.shape)
            np.testing.assert_allclose(gradient, expected, atol=backward, rtol=backward, err_msg=name)
            compared += 1
    assert compared >= 4


def test_every_recorded_case_is_in_one_of_the_tests() -> None:
    assert len(NAMES) == 47
    assert sorted([*cases(True), *cases(False), *DECIDED]) == NAMES


@pytest.mark.parametrize("name", cases(drops=False))
def test_equals_megengine(name: str, place: Device) -> None:
    case = Recorded(name)
    case.inputs = place.put(case.inputs)
    check(case, *place.get(run(case)))


@pytest.mark.parametrize("name", cases(drops=True))
def test_equals_megengine_under_its_own_dropout_masks(name: str) -> None:
    case = Recorded(name)
    check(case, *run_with_recorded_masks(case))


def masked(name: str, hidden: Any) -> tuple[Recorded, tuple[Any, Any, Any]]:
    """A recorded case, and what it gives with one explicit mask (N*H, L, S) in place of all its masks."""
    case = Recorded(name)
    plain = dict(attn_mask=hidden, key_padding_mask=None, is_causal=False, maybe_cudnn_style_mask=False)
    return case, run(case, **plain)


def assert_same(first: tuple[Any, Any, Any], second: tuple[Any, Any, Any]) -> None:
    np.testing.assert_allclose(first[0], second[0], atol=1e-6)
    np.testing.assert_allclose(first[1], second[1], atol=1e-6)
    for one, other in zip(first[2] or (), second[2] or (), strict=True):
        if one is not None:
            np.testing.assert_allclose(one, other, atol=1e-5)


def per_head(hidden: Any, case: Recorded) -> Any:
    """(N, L, S) -> (N*H, L, S)"""
    return np.repeat(hidden, case.params["num_heads"], axis=0)


def test_causal_holds_beside_key_padding() -> None:
    case = Recorded("causal_hint_dropped_by_kpm")
    padding = case.inputs["key_padding_mask"]
    queries = case.inputs["q"].shape[1]
    causal = ~np.tri(queries, padding.shape[1], dtype=bool)
    case, expected = masked("causal_hint_dropped_by_kpm", per_head(causal | padding[:, None], case))
    assert_same(run(case), expected)


def test_causal_and_another_mask_both_hold() -> None:
    case = Recorded("causal_hint_other_mask")
    bias = case.inputs["attn_mask"]
    case, expected = masked(
        "causal_hint_other_mask", np.where(np.tri(*bias.shape, dtype=bool), bias, -np.inf).astype("f4")
    )
    assert_same(run(case), expected)


def test_cudnn_style_masks_are_honoured() -> None:
    case = Recorded("cudnn_style_ignored_on_cpu")
    (low, high), (query_lengths, key_lengths) = case.inputs["attn_mask"], case.inputs["key_padding_mask"]
    key = np.arange(case.inputs["k"].shape[1])
    seen = (key >= low[:, None]) & (key < high[:, None])
    seen = seen & (key < key_lengths[:, None, None])
    seen &= np.arange(case.inputs["q"].shape[1])[:, None] < query_lengths[:, None, None]
    case, expected = masked("cudnn_style_ignored_on_cpu", per_head(~seen, case))
    assert_same(run(case), expected)


def test_a_row_without_keys_is_zero() -> None:
    case = Recorded("fully_masked_row_nan")
    out, weights, _ = run(case)
    empty = np.isnan(case.outputs["attn_weights"]).all(axis=-1)
    assert empty.any()
    assert (weights[empty] == 0).all()
    rows = np.isnan(case.outputs["out"]).all(axis=-1)
    assert rows.any()
    assert (out[rows] == 0).all()
    np.testing.assert_allclose(out[~rows], case.outputs["out"][~rows], atol=3e-6)
