"""The module: construction, modes, state, copies, and a live comparison with PyTorch's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import mha
from mha import MultiHeadAttention, convert
from mha.cpu import load


def x(*shape: int, dtype: Any = np.float32, salt: int = 0) -> Any:
    return np.random.default_rng([*shape, salt]).standard_normal(shape).astype(dtype)


def test_initial_parameters() -> None:
    mha.seed(4)
    layer = MultiHeadAttention(16, 4, kdim=10, vdim=6, add_bias_kv=True)
    parts = layer.layout.views(layer.io_weight_bias)
    for name, view in parts.items():
        if name.endswith("bias"):
            assert (view == 0).all()
            continue
        bound = (6 / sum(view.shape)) ** 0.5
        assert np.abs(view).max() <= bound
        assert np.abs(view).max() > 0.8 * bound
    assert layer.bias_k.shape == layer.bias_v.shape == (1, 1, 16)
    mha.seed(4)
    again = MultiHeadAttention(16, 4, kdim=10, vdim=6, add_bias_kv=True)
    assert (again.io_weight_bias == layer.io_weight_bias).all()
    assert (MultiHeadAttention(16, 4, kdim=10, vdim=6).io_weight_bias != layer.io_weight_bias).any()


def test_it_is_the_function() -> None:
    layer = MultiHeadAttention(16, 4, add_bias_kv=True, add_zero_attn=True, kdim=10, vdim=6, dtype=np.float64)
    q, k, v = x(2, 5, 16, dtype=np.float64), x(2, 7, 10, dtype=np.float64), x(2, 7, 6, dtype=np.float64)
    output, weights = layer(q, k, v, need_weights=True, is_causal=True)
    flags = {f"{name}bias": True for name in "qkvo"}
    result = mha.multi_head_attention(
        q, k, v, 16, 4, 0.0, 0.0, layer.io_weight_bias, **flags, bias_k=layer.bias_k, bias_v=layer.bias_v,
        add_zero_attn=True, need_weights=True, is_causal=True,
    )  # fmt: skip
    np.testing.assert_array_equal(output, result.attn_output)
    np.testing.assert_array_equal(weights, result.attn_output_weights)
    ours = layer.backward(output, weights)
    theirs = mha.multi_head_attention_backward(output, result, weights)
    for one, other in zip(ours[:6], theirs[:6], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_call_is_used_up_by_its_backward() -> None:
    layer = MultiHeadAttention(8, 2)
    inputs = x(1, 3, 8)
    with pytest.raises(RuntimeError, match="Call the layer first"):
        layer.backward(inputs)
    layer(inputs, inputs, inputs)
    with pytest.raises(ValueError, match=r"\(1, 3, 7\)"):
        layer.backward(inputs[..., :7])
    with pytest.raises(TypeError, match="float64"):
        layer.backward(inputs.astype(np.float64))
    layer.backward(inputs)
    with pytest.raises(RuntimeError):
        layer.backward(inputs)
    layer.eval()(inputs, inputs, inputs)
    with pytest.raises(RuntimeError):
        layer.backward(inputs)


def test_dropout_follows_the_mode() -> None:
    layer = MultiHeadAttention(8, 2, attn_dropout=0.5, out_dropout=0.5)
    inputs = x(2, 6, 8)
    first, second = (layer(inputs, inputs, inputs)[0] for _ in range(2))
    assert (first != second).any()
    assert (first == 0).any()
    layer.eval()
    first, second = (layer(inputs, inputs, inputs)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_frozen_parameters_are_read_only_until_training() -> None:
    layer = MultiHeadAttention(8, 2, add_bias_kv=True).freeze()
    assert not layer.training
    for parameter in layer.state_dict().values():
        with pytest.raises(ValueError, match="read-only"):
            parameter[...] = 0
    layer.train()
    layer.io_weight_bias[...] = 0
    layer.freeze()
    layer.load_state_dict(MultiHeadAttention(8, 2, add_bias_kv=True).state_dict())
    assert (layer.io_weight_bias != 0).any()
    layer.io_weight_bias[...] = 1


def test_frozen_weights_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MultiHeadAttention(48, 4).eval()
    for length in (3, 70):
        inputs = x(2, length, 48)
        plain = layer(inputs, inputs, inputs)[0]
        layer.freeze()
        assert set(layer._packed) == {"q_weight", "k_weight", "v_weight", "o_weight"}
        np.testing.assert_array_equal(layer(inputs, inputs, inputs)[0], plain)
        layer.train().eval()
        assert not layer._packed
    layer.freeze()
    for level in load.runnable_levels():
        monkeypatch.setenv("MHA_CPU_ISA", level)
        np.testing.assert_allclose(layer(inputs, inputs, inputs)[0], plain, atol=1e-5)


def test_state_goes_out_and_in() -> None:
    layer, other = (MultiHeadAttention(8, 2, add_bias_kv=True) for _ in range(2))
    state = layer.state_dict()
    assert list(state) == ["io_weight_bias", "bias_k", "bias_v"]
    other.load_state_dict(state)
    for name, parameter in other.state_dict().items():
        np.testing.assert_array_equal(parameter, state[name])
        assert parameter is not state[name]
    with pytest.raises(ValueError, match=r"bias_k.*io_weight_bias|io_weight_bias.*bias_k"):
        other.load_state_dict({"io_weight_bias": state["io_weight_bias"]})


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "repr"])
def test_copies(way: str) -> None:
    layer = MultiHeadAttention(12, 3, 0.1, 0.2, bias=False, add_zero_attn=True, kdim=5, num_kv_heads=1, scale=0.3)
    layer.freeze()
    made = {
        "pickle": lambda: pickle.loads(pickle.dumps(layer)),
        "deepcopy": lambda: copy.deepcopy(layer),
        "repr": lambda: eval(repr(layer), {"MultiHeadAttention": MultiHeadAttention}),
    }[way]()
    assert repr(made) == repr(layer)
    assert made.layout == layer.layout
    if way != "repr":
        q, kv = x(1, 4, 12), (x(1, 6, 5), x(1, 6, 12))
        np.testing.assert_array_equal(made(q, *kv)[0], layer(q, *kv)[0])
        assert not made.io_weight_bias.flags.writeable


@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 10}])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bias_kv", [True, False])
def test_equals_torchs_module(widths: dict[str, int], bias: bool, bias_kv: bool) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(
        16, 4, bias=bias, add_bias_kv=bias_kv, batch_first=True, dtype=torch.float64, **widths
    )
    ours = MultiHeadAttention.from_torch(theirs.state_dict(), 4)
    q, k, v = (x(3, n, widths.get(w, 16), dtype=np.float64) for n, w in ((5, ""), (7, "kdim"), (7, "vdim")))
    grad = x(3, 5, 16, dtype=np.float64, salt=1)
    tensors = [torch.tensor(a, requires_grad=True) for a in (q, k, v)]
    expected, weights = theirs(*tensors, average_attn_weights=True)
    expected.backward(torch.tensor(grad))
    output, found = ours(q, k, v, need_weights=True, average_attn_weights=True)
    gradients = ours.backward(grad)
    np.testing.assert_allclose(output, expected.detach().numpy(), atol=1e-13)
    np.testing.assert_allclose(found, weights.detach().numpy(), atol=1e-14)
    for one, tensor in zip(gradients[:3], tensors, strict=True):
        np.testing.assert_allclose(one, tensor.grad.numpy(), atol=1e-12)
    parameters = convert.PackedParameters(gradients.io_weight_bias, ours.layout, gradients.bias_k, gradients.bias_v)
    for name, gradient in convert.to_torch(parameters).items():
        np.testing.assert_allclose(gradient, theirs.get_parameter(name).grad.numpy(), atol=1e-12, err_msg=name)


def test_any_layout_that_parameters_have() -> None:
    layout = mha.PackedLayout(8, 2, qbias=True, qproj_size=12, kproj_size=12, vproj_size=6, oproj_size=0)
    parameters = convert.PackedParameters(x(layout.length), layout, scale=0.25)
    layer = MultiHeadAttention.from_parameters(parameters).eval()
    query = x(2, 3, 8)
    expected = mha.multi_head_attention(query, query, query, attn_drop=0.0, out_drop=0.0, training=False,
                                        **parameters.options).attn_output  # fmt: skip
    assert expected.shape == (2, 3, 6)
    for made in (layer, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).freeze()):
        np.testing.assert_allclose(made(query, query, query)[0], expected, rtol=1e-6)
    layer.train()(query, query, query)
    assert layer.backward(np.ones_like(expected)).io_weight_bias.shape == (layout.length,)
    assert f"layout={layout!r}" in repr(layer)
    assert layer.bias


def test_ported_weights_draw_nothing() -> None:
    layout = mha.PackedLayout(8, 2)
    mha.seed(0)
    first = MultiHeadAttention(8, 2).io_weight_bias
    mha.seed(0)
    parameters = convert.PackedParameters(x(layout.length), layout)
    ported = MultiHeadAttention.from_parameters(parameters)
    np.testing.assert_array_equal(MultiHeadAttention(8, 2).io_weight_bias, first)
    assert not np.shares_memory(ported.io_weight_bias, parameters.io_weight_bias)
    with pytest.raises(ValueError, match="elements, but this layout has"):
        MultiHeadAttention.from_parameters(parameters._replace(io_weight_bias=x(3)))
