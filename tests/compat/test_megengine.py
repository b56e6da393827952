"""compat.megengine: MegEngine's signature and pair of results, on its recorded cases."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from recorded_megengine import Recorded, cases

import mha
from mha.compat import megengine as compat

DIFFERENTIATED = {"dq": "query", "dk": "key", "dv": "value", "dw": "io_weight_bias", "dbias_k": "bias_k",
                  "dbias_v": "bias_v"}  # fmt: skip


@pytest.mark.parametrize("name", cases(drops=False))
def test_equals_megengine(name: str) -> None:
    case = Recorded(name)
    forward, backward_tolerance = case.tolerance
    (output, weights), backward = compat.multi_head_attention_vjp(**case.arguments())
    np.testing.assert_allclose(output, case.outputs["out"], atol=forward, rtol=forward)
    np.testing.assert_allclose(weights, case.outputs["attn_weights"], atol=forward, rtol=forward)
    pair = compat.multi_head_attention(**case.arguments())
    assert isinstance(pair, tuple)
    for one, other in zip(pair, (output, weights), strict=True):
        np.testing.assert_array_equal(one, other)
    if not case.params["training"]:
        with pytest.raises(ValueError, match="training=False"):
            backward(case.inputs["dout"])
        return
    gradients = backward(case.inputs["dout"])
    compared = DIFFERENTIATED.keys() & case.outputs.keys()
    assert len(compared) >= 4
    for name in compared:
        found = gradients[DIFFERENTIATED[name]]
        np.testing.assert_allclose(
            found, case.outputs[name].reshape(found.shape), atol=backward_tolerance, rtol=backward_tolerance
        )


def test_no_weights_are_none() -> None:
    case = Recorded(cases(drops=False)[0])
    assert compat.multi_head_attention(**(case.arguments() | {"need_weights": False}))[1] is None


def test_signature_is_megengines() -> None:
    """The first 27 parameters of the package's own function, which has more behind them."""
    own = list(inspect.signature(mha.multi_head_attention).parameters.values())
    assert [(p.name, p.default) for p in inspect.signature(compat.multi_head_attention).parameters.values()] == [
        (p.name, p.default) for p in own[:27]
    ]


def test_float_masks_have_gradients() -> None:
    case = Recorded("attn2d_float_finite")
    _, backward = compat.multi_head_attention_vjp(**case.arguments())
    assert "attn_mask" not in backward(case.inputs["dout"])
    gradient = backward(case.inputs["dout"], mask_gradients=True)["attn_mask"]
    assert gradient.shape == case.inputs["attn_mask"].shape
    assert np.abs(gradient.sum(axis=1)).max() < 1e-5 < np.abs(gradient).max()


def test_the_module_honours_its_dropout_and_has_a_repr() -> None:
    layer = compat.MultiHeadAttention(8, 2, 0.5, 0.25)
    assert (layer.attn_dropout, layer.out_dropout) == (0.5, 0.25)
    assert "attn_dropout=0.5" in repr(layer)
    x = np.ones((1, 3, 8), np.float32)
    output, weights = layer(x, x, x)
    assert weights is None
    assert (output == 0).any()
