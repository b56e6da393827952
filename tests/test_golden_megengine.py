"""Every recorded case of the real MegEngine 1.13.0: outputs, weights and all gradients.

The files `ref_*` hold a float64 model of what released MegEngine refuses (bias_k, bias_v, add_zero_attn, reslink).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_dropout import draws, keep_mask

import mha
from mha.functional import MultiHeadAttentionGradients
from mha.packed_call import PackedCall
from mha.problem import Dropout

DATA = Path(__file__).parent / "data" / "megengine"
NAMES = sorted(path.stem for path in DATA.glob("*.npz"))
SIZES = ("qproj_size", "kproj_size", "vproj_size", "oproj_size")
FLAGS = ("qbias", "kbias", "vbias", "obias", "is_causal", "maybe_cudnn_style_mask", "average_attn_weights",
         "add_zero_attn", "reslink", "training")  # fmt: skip

#: What MegEngine does otherwise: the flag lost beside a mask, a mask it takes for causal, masks it ignores, NaN.
DECIDED = ("causal_hint_dropped_by_kpm", "causal_hint_other_mask", "cudnn_style_ignored_on_cpu", "fully_masked_row_nan")


class Recorded:
    """One file: parameters, inputs and recorded outputs."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / f"{name}.npz") as stored:
            arrays = dict(stored)
        self.params = json.loads(str(arrays.pop("params")))
        self.inputs = {key[3:]: x for key, x in arrays.items() if key.startswith("in_")}
        self.outputs = {key[4:]: x for key, x in arrays.items() if key.startswith("out_")}
        self.model = name.startswith("ref_")
        if self.model:
            floats = {key: x for key, x in self.inputs.items() if x.dtype == np.float32}
            self.inputs |= {key: x.astype(np.float64) for key, x in floats.items()}

    @property
    def drops(self) -> bool:
        return self.params["training"] and (self.params["attn_drop"] > 0 or self.params["out_drop"] > 0)

    @property
    def tolerance(self) -> tuple[float, float]:
        """Absolute, of forward and gradients: MegEngine rounds to float16 between all stages."""
        if self.inputs["q"].dtype == np.float16:
            return 4e-3, 1.5e-2
        return (1e-12, 1e-12) if self.model else (3e-6, 1e-5)

    def arguments(self) -> dict[str, Any]:
        p, x = self.params, self.inputs
        given = {name: x.get(name) for name in ("bias_k", "bias_v", "attn_mask", "key_padding_mask")}
        fixed = dict(query=x["q"], key=x["k"], value=x["v"], io_weight_bias=x["w"], need_weights=True)
        drops = dict(attn_drop=p["attn_drop"], out_drop=p["out_drop"])
        numbers = {name: p[name] for name in ("embed_dim", "num_heads", *SIZES, *FLAGS)}
        return {**fixed, **drops, **numbers, **given}

    def keep_masks(self) -> tuple[Any, Any]:
        """Of the weights (N, H, L, T) and the output (N, L, O), regenerated; checked where they were recorded."""
        p, stream = self.params, draws(self.params["seed"])
        batch, queries, width = self.outputs["out"].shape
        keys = self.inputs["k"].shape[1] + p["has_bias_kv"] + p["add_zero_attn"]
        weights = keep_mask(stream, p["attn_drop"], (batch, p["num_heads"], queries, keys))
        output = keep_mask(stream, p["out_drop"], (batch, queries, width))
        for kept, name in ((weights, "attn_keep"), (output, "out_keep")):
            if name in self.outputs:
                assert (kept.ravel() == (self.outputs[name].ravel() != 0)).all(), name
        return weights, output


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


def cases(drops: bool) -> list[str]:
    return [name for name in NAMES if name not in DECIDED and Recorded(name).drops == drops]


def test_every_recorded_case_is_in_one_of_the_tests() -> None:
    assert len(NAMES) == 47
    assert sorted([*cases(True), *cases(False), *DECIDED]) == NAMES


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", cases(drops=False))
def test_equals_megengine(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHA_BACKEND", backend)
    case = Recorded(name)
    check(case, *run(case))


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
