"""compat.megengine: MegEngine's signature and pair of results, on its recorded cases."""

from __future__ import annotations

import inspect
from typing import Any

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


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False, "add_zero_attn": True},
                                     {"add_bias_kv": True, "kdim": 5, "vdim": 7},
                                     {"num_kv_heads": 2, "scale": 0.3, "dtype": np.float64, "xp": np}])  # fmt: skip
def test_the_module_is_the_function_with_its_vector(options: dict[str, Any], average: bool) -> None:
    layer = compat.MultiHeadAttention(8, 4, **options)
    rng, dtype = np.random.default_rng(0), layer.io_weight_bias.dtype
    inputs = [rng.standard_normal((2, 6, n)).astype(dtype) for n in (8, layer.layout.kdim, layer.layout.vdim)]
    masks = {
        "key_padding_mask": np.arange(12).reshape(2, 6) % 5 == 4,
        "attn_mask": rng.standard_normal((6, 6)).astype(dtype),
    }
    returned = {"need_weights": True, "average_attn_weights": average, "is_causal": True}
    pair = layer(*inputs, **masks, **returned)
    flags = dict.fromkeys(("qbias", "kbias", "vbias", "obias"), layer.bias)
    sizes = {f"{x}proj_size": getattr(layer.layout, f"{x}proj_size") for x in "qkvo"}
    right = mha.multi_head_attention(
        *inputs, 8, 4, 0.0, 0.0, layer.io_weight_bias, **sizes, **flags, bias_k=layer.bias_k, bias_v=layer.bias_v,
        add_zero_attn=layer.add_zero_attn, num_kv_heads=layer.layout.num_kv_heads, scale=layer.scale, **masks,
        **returned,
    )  # fmt: skip
    for one, other in zip(pair, right[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    gradients = layer.backward(pair[0], pair[1])
    expected = mha.multi_head_attention_backward(right[0], right, right[1])
    for one, other in zip(gradients, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)


def test_cudnn_style_masks_are_ranges_and_lengths() -> None:
    """MegEngine ignores them on the CPU."""
    layer = compat.MultiHeadAttention(8, 2, dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((2, 4, 8))
    ranges, lengths = np.array([[0, 0, 1, 2], [2, 3, 4, 4]]), np.array([[4, 3], [4, 2]])
    keys = np.arange(4)
    hidden = (keys < ranges[0][:, None]) | (keys >= ranges[1][:, None])
    hidden = hidden[None] | (keys >= lengths[1][:, None])[:, None] | (keys >= lengths[0][:, None])[:, :, None]
    pair = layer(x, x, x, lengths, ranges, maybe_cudnn_style_mask=True)
    arguments = (x, x, x, 8, 2, 0.0, 0.0, layer.io_weight_bias)
    flags = dict.fromkeys(("qbias", "kbias", "vbias", "obias"), True)
    same = compat.multi_head_attention(*arguments, **flags, key_padding_mask=lengths, attn_mask=ranges,
                                       maybe_cudnn_style_mask=True)  # fmt: skip
    right = compat.multi_head_attention(*arguments, **flags, attn_mask=np.repeat(hidden, 2, axis=0))
    for found in (pair, same):
        np.testing.assert_allclose(found[0], right[0], rtol=1e-12)
