"""Every recorded case of Paddle's fused attention: output, cache and gradients.

Recorded from Paddle's own operations in the order of its GPU operator, which has no CPU version.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import Device

from mha import layer
from mha.compat import paddle
from mha.compat.paddle import functional

DATA = Path(__file__).parents[1] / "data" / "paddle"
NAMES = sorted(path.stem for path in DATA.glob("*.npz"))

#: An output dropout of 1 in evaluation: identity by Paddle's table, dropped by its operator.
DECIDED = [name for name in NAMES if "_out_drop_one_eval_" in name]


class Recorded:
    """One file."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / f"{name}.npz") as stored:
            arrays = dict(stored)

        def part(prefix: str) -> dict[str, Any]:
            return {key.removeprefix(prefix): x for key, x in arrays.items() if key.startswith(prefix)}

        self.inputs, self.gradients = part("in_"), part("grad_")
        self.options = {key: x.item() for key, x in part("arg_").items()}
        self.results = {key: arrays[key] for key in ("out", "cache_kv_out") if key in arrays}
        single = self.inputs["x"].dtype == np.float32
        self.forward, self.backward = (2e-5, 1e-4) if single else (1e-10, 1e-9)

    def arguments(self) -> dict[str, Any]:
        aside = ("dout", "attn_keep", "out_keep", "attn_mask_bool")
        return {name: x for name, x in self.inputs.items() if name not in aside} | self.options

    @property
    def drops(self) -> bool:
        """Whether training dropout needs its recorded masks."""
        return "attn_keep" in self.inputs or "out_keep" in self.inputs


def check(case: Recorded, result: Any, gradients: dict[str, Any]) -> None:
    found = dict(zip(("out", "cache_kv_out"), result if isinstance(result, tuple) else (result,), strict=False))
    assert found.keys() == case.results.keys()
    for name, right in case.results.items():
        assert found[name].dtype == right.dtype
        np.testing.assert_allclose(found[name], right, case.forward, case.forward, err_msg=name)
    compared = 0
    for name, right in case.gradients.items():
        if not name.endswith("_paddle_gpu"):
            assert gradients[name].shape == right.shape
            np.testing.assert_allclose(gradients[name], right, case.backward, case.backward, err_msg=name)
            compared += 1
    assert compared >= 3 or not case.gradients


def run(case: Recorded, **changes: Any) -> tuple[Any, dict[str, Any]]:
    result, backward = paddle.fused_multi_head_attention_vjp(**(case.arguments() | changes))
    return result, backward(case.inputs["dout"]) if case.gradients else {}


def test_the_recordings_are_all_here() -> None:
    assert len(NAMES) == 52
    assert len(DECIDED) == 2
    assert sum(Recorded(name).drops for name in NAMES) >= 5


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DECIDED and not Recorded(name).drops])
def test_equals_paddle(name: str, place: Device) -> None:
    case = Recorded(name)
    case.inputs = place.put(case.inputs)
    check(case, *place.get(run(case)))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DECIDED and Recorded(name).drops])
def test_equals_paddle_under_its_own_dropout_masks(name: str) -> None:
    """Through the reference, which takes the keep masks themselves."""
    case = Recorded(name)
    optional = (
        "pre_ln_scale",
        "pre_ln_bias",
        "ln_scale",
        "ln_bias",
        "qkv_bias",
        "linear_bias",
        "cache_kv",
        "attn_mask",
    )
    defaults: dict[str, Any] = dict.fromkeys(optional)
    call = functional._Call.build(defaults | {"ring_id": -1} | case.arguments())
    for field, mask in (("dropout", "attn_keep"), ("output_dropout", "out_keep")):
        drop = getattr(call.layer, field)
        if mask in case.inputs:
            keep = case.inputs[mask].astype(bool)
            call.layer = replace(call.layer, **{field: replace(drop, keep=keep, state=None)})
    output = layer.forward(call.layer).output
    check(case, output, call.backward(case.inputs["dout"], False))


@pytest.mark.parametrize("name", DECIDED)
def test_no_output_is_dropped_in_evaluation(name: str) -> None:
    case = Recorded(name)
    assert case.options["dropout_rate"] == 1.0
    assert not case.options["training"]
    result, _ = run(case)
    expected, _ = run(case, dropout_rate=0.0)
    np.testing.assert_array_equal(result, expected)
    assert not np.allclose(result, case.results["out"])


def test_boolean_masks_are_the_recorded_float_ones() -> None:
    name = next(name for name in NAMES if "mask_bool" in name)
    case = Recorded(name)
    keep = case.inputs["attn_mask_bool"].astype(bool)
    for mask in (keep, keep.astype(np.int64), keep.astype(np.uint8) * 3):
        result, _ = run(case, attn_mask=mask)
        np.testing.assert_allclose(result, case.results["out"], case.forward, case.forward)
