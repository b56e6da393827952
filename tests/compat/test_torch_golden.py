"""Every recorded case of the real PyTorch 2.13: outputs, weights, and gradients of inputs, masks and parameters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mha.compat import torch as compat
from mha.problem import Dropout

DATA = Path(__file__).parents[1] / "data" / "torch"
NAMES = sorted(path.stem for path in DATA.glob("*.npz"))

#: What PyTorch does otherwise: a flag dropped or taken for the mask, appended keys hidden, NaN rows.
DECIDED = ("c03_wrong_hint_weights_f64", "c05_wrong_hint_kpm_noweights_f64", "c07_causal_bias_zero_noweights_f64",
           "f04_fast_causal_flag_ignored_f64", "n01_masked_row_weights_f64", "n06_fastpath_masked_row_f32")  # fmt: skip


class Recorded:
    """One file: how the call was made, its arrays and what came out."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / f"{name}.npz") as stored:
            self.meta = json.loads(str(stored["meta"]))
            groups: dict[str, dict[str, Any]] = {part: {} for part in ("in", "param", "out", "up", "grad", "aux")}
            for key in stored.files:
                part, _, own = key.partition("/")
                if own:
                    groups[part][own] = stored[key]
        self.inputs, self.parameters, self.out, self.up, self.grad, self.aux = groups.values()
        alias = self.meta.get("alias", "none")
        names = {"qkv": ("query",) * 3, "kv": ("query", "key", "key"), "none": ("query", "key", "value")}[alias]
        self.uses = dict(zip(("query", "key", "value"), names, strict=True))
        self.tolerance = {"rtol": self.meta["rtol"], "atol": self.meta["atol"]}

    @property
    def api(self) -> str:
        return str(self.meta["api"])

    def own(self) -> dict[str, Any]:
        """query, key and value, then the other inputs."""
        rest = {name: x for name, x in self.inputs.items() if name not in self.uses}
        return {name: self.inputs[source] for name, source in self.uses.items()} | rest

    def module(self) -> compat.MultiheadAttention:
        module = compat.MultiheadAttention(**self.meta["ctor"], dtype=self.inputs["query"].dtype)
        module.load_state_dict(self.parameters)
        return module.train(self.meta["mode"] == "train")

    def run(self, **changes: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Output, weights and gradients by the names of the file."""
        if self.api == "sdpa":
            output, backward = compat.scaled_dot_product_attention_vjp(**self.own(), **self.meta["call"])
            return output, None, backward(self.up["output"], mask_gradients=True) if self.up else {}
        if self.api == "functional":
            return self.run_functional()
        module = self.module().train()
        module.dropout = 0.0
        output, weights = module(**(self.own() | self.meta["call"] | changes))
        made = self.gradients_of(module) if self.up else {}
        return output, weights, made

    def gradients_of(self, module: compat.MultiheadAttention) -> dict[str, Any]:
        g = module.backward(self.up["output"], self.up.get("weights"), mask_gradients=True)
        return self.summed(g._asdict() | g.parameters)

    def run_functional(self) -> tuple[Any, Any, dict[str, Any]]:
        ctor = self.meta["ctor"]
        names = {"out_proj.weight": "out_proj_weight", "out_proj.bias": "out_proj_bias"}
        parameters = dict.fromkeys(("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj_bias"))
        parameters |= {names.get(name, name): x for name, x in self.parameters.items()}
        (output, weights), backward = compat.multi_head_attention_forward_vjp(
            **self.own(), **parameters, embed_dim_to_check=ctor["embed_dim"], num_heads=ctor["num_heads"],
            add_zero_attn=ctor["add_zero_attn"], dropout_p=0.0, **self.meta["call"],
        )  # fmt: skip
        gradients = backward(self.up["output"], self.up.get("weights"), mask_gradients=True)
        back = {new: old for old, new in names.items()}
        return output, weights, self.summed({back.get(name, name): x for name, x in gradients.items()})

    def summed(self, gradients: dict[str, Any]) -> dict[str, Any]:
        """An array that was used more than once has the sum of its gradients."""
        total: dict[str, Any] = {}
        for name, source in self.uses.items():
            total[source] = total.get(source, 0) + gradients[name]
        return {name: x for name, x in gradients.items() if name not in self.uses} | total


def check(case: Recorded, output: Any, weights: Any, gradients: dict[str, Any]) -> None:
    assert output.dtype == case.out["output"].dtype
    np.testing.assert_allclose(output, case.out["output"], **case.tolerance)
    assert (weights is None) == ("weights" not in case.out)
    if weights is not None:
        np.testing.assert_allclose(weights, case.out["weights"], **case.tolerance)
    for name, expected in case.grad.items():
        assert gradients[name].shape == expected.shape, name
        if name == "in_proj_bias" and case.meta["case"].startswith("m15"):
            # The true gradient of the key's bias is 0; with large scores in float32 both have rounding errors only.
            rounding = np.abs(expected[8:16]).max()
            assert np.abs(gradients[name][8:16]).max() <= 2 * rounding < 2e-5
            expected[8:16] = gradients[name][8:16]
        np.testing.assert_allclose(gradients[name], expected, **case.tolerance, err_msg=name)


def test_the_recordings_are_all_here() -> None:
    assert len(NAMES) == 77
    assert set(DECIDED) < set(NAMES)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in DECIDED and not name.startswith("d01")])
def test_equals_torch(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHA_BACKEND", backend)
    case = Recorded(name)
    check(case, *case.run())


def test_equals_torch_under_its_own_dropout_mask() -> None:
    """Through the reference, which takes the keep mask itself."""
    case = Recorded("d01_dropout_train_f64")
    module = case.module()
    own = case.own()
    made = module._build(own["query"], own["key"], own["value"], length_first=True, average=False)
    made.call = replace(made.call, dropout=Dropout(module.dropout, keep=case.aux["keep_mask"].astype(bool)))
    output, weights = made.forward()
    module._calls.latest = made, None
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
