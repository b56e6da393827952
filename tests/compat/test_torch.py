"""compat.torch beside what the recordings show: the module as an object, lists of arrays, bad calls."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import numpy as np
import pytest

import mha
from mha.compat import torch as compat

MultiheadAttention = compat.MultiheadAttention
RNG = np.random.default_rng(0)


def array(*shape: int, dtype: Any = np.float64) -> Any:
    return RNG.standard_normal(shape).astype(dtype)


def module(*args: Any, **options: Any) -> compat.MultiheadAttention:
    return MultiheadAttention(*args, **({"dtype": "float64"} | options))


def test_state_dict_keys_and_shapes() -> None:
    shapes = {name: x.shape for name, x in module(8, 2, add_bias_kv=True).state_dict("a.").items()}
    assert shapes == {"a.in_proj_weight": (24, 8), "a.in_proj_bias": (24,), "a.bias_k": (1, 1, 8),
                      "a.bias_v": (1, 1, 8), "a.out_proj.weight": (8, 8), "a.out_proj.bias": (8,)}  # fmt: skip
    separate = module(8, 2, kdim=5, vdim=3, bias=False)
    assert list(separate.state_dict()) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert separate.k_proj_weight is not None
    assert separate.k_proj_weight.shape == (8, 5)
    assert separate.in_proj_weight is None
    assert separate.out_proj.bias is None
    assert len(separate.parameters()) == 4


def test_the_state_goes_into_a_packed_layer_and_back() -> None:
    layer = module(8, 2, batch_first=True, add_bias_kv=True)
    x = array(2, 5, 8)
    packed = mha.MultiHeadAttention.from_torch(layer.state_dict(), 2)
    np.testing.assert_allclose(packed(x, x, x)[0], layer(x, x, x)[0], rtol=1e-12)
    other = module(8, 2, batch_first=True, add_bias_kv=True)
    other.load_state_dict(mha.convert.to_torch(mha.convert.from_torch(layer.state_dict(), 2)))
    np.testing.assert_array_equal(other(x, x, x)[0], layer(x, x, x)[0])


def test_repr_pickle_and_copies() -> None:
    layer = module(8, 2, dropout=0.25, kdim=4, add_zero_attn=True, batch_first=True).eval()
    again = eval(repr(layer), vars(compat))
    assert repr(again) == repr(layer)
    assert "out_features=8" in repr(layer.out_proj)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert repr(other) == repr(layer)
        assert not other.training
        for name, x in layer.state_dict().items():
            np.testing.assert_array_equal(other.state_dict()[name], x)
            assert other.state_dict()[name] is not x


def test_names_of_devices_and_dtypes() -> None:
    class TorchDtype:
        def __str__(self) -> str:
            return "torch.float16"

    assert module(4, 2, device="cpu", dtype=TorchDtype()).out_proj.weight.dtype == np.float16
    assert MultiheadAttention(4, 2).out_proj.weight.dtype == np.float32
    assert module(4, 2, dtype=np.float64).out_proj.weight.dtype == np.float64
    with pytest.raises(ValueError, match="device is 'mps'"):
        module(4, 2, device="mps")
    with pytest.raises(TypeError):
        module(4, 2, dtype="float7")


def test_seeded_parameters_repeat() -> None:
    mha.seed(3)
    first = module(8, 2, add_bias_kv=True).state_dict()
    mha.seed(3)
    second = module(8, 2, add_bias_kv=True).state_dict()
    for name, x in first.items():
        np.testing.assert_array_equal(second[name], x)


def test_dropout_is_for_training_and_replayed_in_the_backward() -> None:
    layer = module(8, 2, dropout=0.5, batch_first=True)
    x, up = array(2, 6, 8), array(2, 6, 8)
    mha.seed(1)
    first, weights = layer(x, x, x)
    mha.seed(1)
    second, _ = layer(x, x, x)
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(weights.sum(-1), 1)
    gradient = layer.backward(up)
    step = 1e-6
    direction = array(2, 6, 8)
    sides = []
    for moved in (x + step * direction, x - step * direction):
        mha.seed(1)
        sides.append((layer(moved, moved, moved)[0] * up).sum())
    total = gradient.query + gradient.key + gradient.value
    assert abs((sides[0] - sides[1]) / (2 * step) - (total * direction).sum()) < 1e-6
    layer.eval()
    np.testing.assert_array_equal(layer(x, x, x)[0], layer(x, x, x)[0])


def test_backward_takes_the_latest_call_of_its_thread_once() -> None:
    layer = module(8, 2)
    x = array(5, 1, 8)
    output, _ = layer(x, x, x)
    failures = []

    def elsewhere() -> None:
        try:
            layer.backward(output)
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(failures) == 1
    layer.backward(output)
    with pytest.raises(RuntimeError, match="Call the layer first"):
        layer.backward(output)
    layer.eval()(x, x, x)
    with pytest.raises(RuntimeError):
        layer.backward(output)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_a_list_equals_its_samples_one_by_one(average: bool, causal: bool) -> None:
    layer = module(12, 3, batch_first=True)
    parts = [array(n, 12) for n in (4, 1, 0, 70, 9)]
    options: dict[str, Any] = {"average_attn_weights": average, "is_causal": causal}
    outputs, weights = layer(parts, parts, parts, **options)
    ups = [array(*x.shape) for x in parts]
    gradients = layer.backward(ups)
    totals = {name: np.zeros_like(x) for name, x in gradients.parameters.items()}
    for i, x in enumerate(parts):
        output, weight = layer(x, x, x, **options)
        np.testing.assert_allclose(outputs[i], output, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(weights[i], weight, rtol=1e-11, atol=1e-13)
        one = layer.backward(ups[i])
        for found, right in zip((gradients.query, gradients.key, gradients.value), one[:3], strict=True):
            np.testing.assert_allclose(found[i], right, rtol=1e-10, atol=1e-12)
        for name, x in one.parameters.items():
            totals[name] += x
    for name, x in totals.items():
        np.testing.assert_allclose(gradients.parameters[name], x, rtol=1e-10, atol=1e-12, err_msg=name)


def test_a_list_without_weights_drops_in_training() -> None:
    layer = module(12, 3, batch_first=True, dropout=0.4)
    parts = [array(n, 12) for n in (4, 6)]
    outputs, weights = layer(parts, parts, parts, need_weights=False)
    assert weights is None
    assert not np.allclose(outputs[0], layer.eval()(parts, parts, parts)[0][0])
    with pytest.raises(ValueError, match=r"need_weights.*one by one"):
        layer.train()(parts, parts, parts)


def test_lists_are_for_plain_self_attention() -> None:
    layer = module(12, 3, batch_first=True)
    parts = [array(n, 12) for n in (4, 6)]
    for call in (
        lambda: layer(parts, list(parts), parts),
        lambda: layer(parts, parts, parts, attn_mask=np.zeros((4, 4), bool)),
        lambda: module(12, 3)(parts, parts, parts),
        lambda: module(12, 3, batch_first=True, add_zero_attn=True)(parts, parts, parts),
    ):
        with pytest.raises(ValueError, match="list of 2 arrays"):
            call()
    stacked = [array(1, 4, 12)]
    with pytest.raises(ValueError, match=r"\(length, width\)"):
        layer(stacked, stacked, stacked)
    outputs, _ = layer(parts, parts, parts)
    with pytest.raises(ValueError, match=r"lengths \[4, 6\]"):
        layer.backward(outputs[:1])


def test_is_causal_alone_masks() -> None:
    layer = module(8, 2)
    x = array(5, 3, 8)
    for need_weights in (True, False):
        output, _ = layer(x, x, x, need_weights=need_weights, is_causal=True)
        expected, _ = layer(x, x, x, need_weights=need_weights, attn_mask=~np.tri(5, dtype=bool))
        np.testing.assert_array_equal(output, expected)


def test_separate_weights_of_any_width() -> None:
    """Widths of query, heads and values that torch has no parameters for."""
    q, k, v = array(4, 2, 6), array(7, 2, 5), array(7, 2, 3)
    weights = {"q_proj_weight": array(8, 6), "k_proj_weight": array(8, 5), "v_proj_weight": array(10, 3)}
    out, bias = array(4, 10), array(26)
    result, _ = compat.multi_head_attention_forward(
        q, k, v, 6, 2, None, bias, None, None, False, 0.0, out, None, use_separate_proj_weight=True, **weights
    )
    heads = [
        (x.swapaxes(0, 1) @ w.T + b).reshape(2, len(x), 2, -1).swapaxes(1, 2)
        for x, w, b in zip((q, k, v), weights.values(), np.split(bias, [8, 16]), strict=True)
    ]
    expected = mha.scaled_dot_product_attention(*heads).swapaxes(1, 2).reshape(2, 4, 10) @ out.T
    np.testing.assert_allclose(result, expected.swapaxes(0, 1), rtol=1e-11)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("appended", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("need_weights", [True, False])
def test_sizes_of_zero(sizes: tuple[int, int, int], appended: dict[str, Any], need_weights: bool) -> None:
    batch, queries, keys = sizes
    layer = module(8, 2, batch_first=True, **appended)
    output, weights = layer(array(batch, queries, 8), array(batch, keys, 8), array(batch, keys, 8),
                            need_weights=need_weights)  # fmt: skip
    assert output.shape == (batch, queries, 8)
    assert weights is None or weights.shape == (batch, queries, keys + 2 * bool(appended))
    gradients = layer.backward(np.ones_like(output), weights)
    assert gradients.key.shape == (batch, keys, 8)
    assert all(np.isfinite(x).all() for x in (gradients.query, gradients.key, *gradients.parameters.values()))


@pytest.mark.parametrize("form", ["strided", "swapped bytes", "unaligned", "read-only"])
def test_arrays_of_any_form(form: str) -> None:
    """Inputs, weights, biases, masks and appended rows, forward and backward."""

    def formed(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        if form == "strided":
            return np.repeat(x, 2, axis=-1)[..., ::2]
        if form == "swapped bytes":
            return x.astype(x.dtype.newbyteorder())
        if form == "unaligned":
            return np.frombuffer(b"." + x.tobytes(), x.dtype, offset=1).reshape(x.shape)
        x.flags.writeable = False
        return x

    given = dict(
        query=array(5, 2, 8), key=array(6, 2, 8), value=array(6, 2, 8), embed_dim_to_check=8, num_heads=2,
        in_proj_weight=array(24, 8), in_proj_bias=array(24), bias_k=array(1, 1, 8), bias_v=array(1, 1, 8),
        add_zero_attn=True, dropout_p=0.0, out_proj_weight=array(8, 8), out_proj_bias=array(8), attn_mask=array(5, 6),
        key_padding_mask=array(2, 6),
    )  # fmt: skip
    (output, _), backward = compat.multi_head_attention_forward_vjp(**given)
    right = backward(np.ones_like(output), mask_gradients=True)
    (found, _), backward = compat.multi_head_attention_forward_vjp(**{n: formed(x) for n, x in given.items()})
    np.testing.assert_allclose(found, output, rtol=1e-12)
    for name, x in backward(formed(np.ones_like(output)), mask_gradients=True).items():
        np.testing.assert_allclose(x, right[name], rtol=1e-10, atol=1e-12, err_msg=name)


def test_signatures_are_torchs() -> None:
    """Parameter names, order and defaults of PyTorch 2.13."""
    forward = inspect.signature(compat.multi_head_attention_forward)
    assert list(forward.parameters) == [
        "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k",
        "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask",
        "need_weights", "attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight",
        "static_k", "static_v", "average_attn_weights", "is_causal",
    ]  # fmt: skip
    assert forward.parameters["training"].default is True
    assert compat.multi_head_attention_forward.__name__ == "multi_head_attention_forward"
    assert "sequence first" in (compat.multi_head_attention_forward.__doc__ or "")
    made = inspect.signature(MultiheadAttention)
    assert [(p.name, p.default) for p in made.parameters.values()][2:] == [
        ("dropout", 0.0), ("bias", True), ("add_bias_kv", False), ("add_zero_attn", False), ("kdim", None),
        ("vdim", None), ("batch_first", False), ("device", None), ("dtype", None),
    ]  # fmt: skip
    call = inspect.signature(MultiheadAttention.forward)
    assert [(p.name, p.default) for p in call.parameters.values()][4:] == [
        ("key_padding_mask", None), ("need_weights", True), ("attn_mask", None), ("average_attn_weights", True),
        ("is_causal", False),
    ]  # fmt: skip


X = array(5, 2, 8)
BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "heads": (lambda: module(8, 3), ValueError, r"embed_dim 8 .* num_heads 3"),
    "no heads": (lambda: module(8, 0), ValueError, "num_heads 0"),
    "dropout": (lambda: module(8, 2, dropout=2.0), ValueError, "dropout is 2.0"),
    "width": (lambda: module(8, 2)(X[..., :6], X, X), ValueError, r"\(2, 5, 6\).*embed_dim 8"),
    "rank": (lambda: module(8, 2)(X[None], X, X), ValueError, r"\(1, 5, 2, 8\).*unbatched"),
    "mixed ranks": (lambda: module(8, 2)(X, X[:, 0], X), ValueError, r"\(5, 8\)"),
    "batch": (lambda: module(8, 2)(X, X[:, :1], X), ValueError, "same batch size"),
    "key width": (lambda: module(8, 2)(X, X[..., :5], X), ValueError, r"weight of key .*\(5, 2, 5\)"),
    "dtype": (lambda: module(8, 2)(X.astype("f4"), X, X), TypeError, "dtypes differ"),
    "byte mask": (lambda: module(8, 2)(X, X, X, attn_mask=np.zeros((5, 5), "u1")), TypeError, "uint8"),
    "mask shape": (lambda: module(8, 2)(X, X, X, attn_mask=np.zeros((1, 5, 5), bool)), ValueError, r"\(1, 5, 5\)"),
    "padding shape": (lambda: module(8, 2)(X, X, X, np.zeros((5, 2), bool)), ValueError, r"\(2, 5\)"),
    "state": (lambda: module(8, 2).load_state_dict({"in_proj_weight": X}), ValueError, r"\(24, 8\)"),
    "no weight": (lambda: function(in_proj_weight=None), ValueError, "in_proj_weight is None"),
    "no separate": (lambda: function(use_separate_proj_weight=True), ValueError, "q_proj_weight.*None"),
    "stack": (lambda: function(in_proj_weight=array(23, 8)), ValueError, r"\(23, 8\), not \(3 \* E"),
    "input bias": (lambda: function(in_proj_bias=array(23)), ValueError, r"\(23,\).*\(24,\)"),
    "out weight": (lambda: function(out_proj_weight=array(8, 7)), ValueError, r"\(8, 7\).* 8 wide"),
    "out bias": (lambda: function(out_proj_bias=array(7)), ValueError, r"\(7,\)"),
    "head count": (lambda: function(num_heads=3), ValueError, "num_heads 3"),
    "head type": (lambda: function(num_heads=2.0), TypeError, "num_heads is 2.0"),
    "one bias row": (lambda: function(bias_k=array(1, 1, 8)), ValueError, "bias_v None"),
    "bias and static": (
        lambda: function(bias_k=array(1, 1, 8), bias_v=array(1, 1, 8), static_k=array(4, 5, 4)),
        ValueError, "cannot be appended",
    ),
    "static": (lambda: function(static_k=array(3, 5, 4)), ValueError, r"\(3, 5, 4\).*\(4, length, 4\)"),
    "static lengths": (lambda: function(static_k=array(4, 6, 4)), ValueError, "same length"),
}  # fmt: skip


def function(**changes: Any) -> Any:
    given = dict(
        query=X, key=X, value=X, embed_dim_to_check=8, num_heads=2, in_proj_weight=array(24, 8), in_proj_bias=None,
        bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0, out_proj_weight=array(8, 8), out_proj_bias=None,
    )  # fmt: skip
    return compat.multi_head_attention_forward(**(given | changes))


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_name_what_is_wrong(name: str) -> None:
    call, error, text = BAD_CALLS[name]
    with pytest.raises(error, match=text):
        call()


def test_bad_gradients() -> None:
    layer = module(8, 2)
    output, weights = layer(X, X, X)
    with pytest.raises(ValueError, match=r"\(5, 2, 7\)"):
        layer.backward(output[..., :7])
    with pytest.raises(TypeError, match="float32"):
        layer.backward(output.astype("f4"))
    with pytest.raises(ValueError, match=r"grad_weights \(2, 5, 4\)"):
        layer.backward(output, weights[..., :4])
    layer(X, X, X, need_weights=False)
    with pytest.raises(ValueError, match="returned weights None"):
        layer.backward(output, weights)
    _, backward = compat.scaled_dot_product_attention_vjp(X, X, X)
    with pytest.raises(ValueError, match="returns no weights"):
        backward(X, X)


def test_dropout_of_scaled_dot_product_attention_is_replayed() -> None:
    q, k, v = array(2, 3, 4, 8), array(2, 3, 6, 8), array(2, 3, 6, 5)
    mha.seed(1)
    output, backward = compat.scaled_dot_product_attention_vjp(q, k, v, dropout_p=0.4)
    assert not np.allclose(output, compat.scaled_dot_product_attention(q, k, v))
    direction, step = array(*v.shape), 1e-6
    sides = []
    for sign in (1, -1):
        mha.seed(1)
        sides.append(compat.scaled_dot_product_attention(q, k, v + sign * step * direction, dropout_p=0.4).sum())
    slope = (sides[0] - sides[1]) / (2 * step)
    assert abs(slope - (backward(np.ones_like(output))["value"] * direction).sum()) < 1e-6
