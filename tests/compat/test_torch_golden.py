"""Every recorded case of the real PyTorch 2.13: outputs, weights, and gradients of inputs, masks and parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from devices import Device
from recorded_torch import NAMES, Recorded, check

from mha.problem import Dropout

#: What PyTorch does otherwise: a flag dropped or taken for the mask, appended keys hidden, NaN rows.
DECIDED = ("c03_wrong_hint_weights_f64", "c05_wrong_hint_kpm_noweights_f64", "c07_causal_bias_zero_noweights_f64",
           "f04_fast_causal_flag_ignored_f64", "n01_masked_row_weights_f64", "n06_fastpath_masked_row_f32")  # fmt: skip


def test_the_recordings_are_all_here() -> None:
    assert len(NAMES) == 77
    assert set(DECIDED) < set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DECIDED and not name.startswith("d01")])
def test_equals_torch(name: str, place: Device) -> None:
    case = Recorded(name)
    case.move_to(place)
    check(case, *place.get(case.run()))


def test_equals_torch_under_its_own_dropout_mask() -> None:
    """Through the reference, which takes the keep mask itself."""
    case = Recorded("d01_dropout_train_f64")
    module = case.module()
    own = case.own()
    made = module._build(own["query"], own["key"], own["value"], length_first=True, average=False)
    made.call = replace(made.call, dropout=Dropout(module.dropout, keep=case.aux["keep_mask"].astype(bool)))
    output, weights = made.forward()
    module._keep((made, None))
    check(case, output, weights, case.gradients_of(module))


def as_one_mask(case: Recorded, hidden: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The case with one explicit mask in place of flag and masks."""
    return case.run(attn_mask=hidden, is_causal=False, key_padding_mask=None)


@pytest.mark.parametrize("name", DECIDED[:4])
def test_the_causal_flag_holds_beside_masks_and_not_for_appended_keys(name: str) -> None:
    case = Recorded(name)
    first = bool(case.meta["ctor"].get("batch_first"))
    queries, batch = case.inputs["query"].shape[first], case.inputs["query"].shape[not first]
    hidden = np.broadcast_to(~np.tri(queries, dtype=bool), (batch, 1, queries, queries))
    if "attn_mask" in case.inputs:
        hidden = hidden | case.inputs["attn_mask"]
    if "key_padding_mask" in case.inputs:
        hidden = hidden | case.inputs["key_padding_mask"][:, None, None]
    output, weights, gradients = case.run()
    expected, expected_weights, expected_gradients = as_one_mask(case, hidden)
    np.testing.assert_allclose(output, expected, **case.tolerance)
    assert not np.allclose(output, case.out["output"])
    if weights is not None:
        np.testing.assert_allclose(weights, expected_weights, **case.tolerance)
    for name, x in expected_gradients.items():
        if x is not None and name != "attn_mask" and not isinstance(x, dict):
            np.testing.assert_allclose(gradients[name], x, **case.tolerance, err_msg=name)


@pytest.mark.parametrize("name", ["n01_masked_row_weights_f64", "n06_fastpath_masked_row_f32"])
def test_a_query_without_keys_gives_the_output_bias(name: str) -> None:
    case = Recorded(name)
    output, weights, gradients = case.run()
    lost = np.isnan(case.out["output"])
    assert lost.any()
    rows = lost.all(axis=-1)
    np.testing.assert_array_equal(output[rows], np.broadcast_to(case.parameters["out_proj.bias"], output[rows].shape))
    np.testing.assert_allclose(output[~lost], case.out["output"][~lost], **case.tolerance)
    if weights is not None:
        assert (weights[np.isnan(case.out["weights"])] == 0).all()
    assert all(np.isfinite(x).all() for x in gradients.values() if x is not None and not isinstance(x, dict))
