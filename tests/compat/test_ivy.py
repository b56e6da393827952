"""compat.ivy beside what the recordings show: batches, gradients, containers, the module, bad calls."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

import mha
from mha.compat import ivy, torch

RNG = np.random.default_rng(0)


def array(*shape: int) -> Any:
    return RNG.standard_normal(shape)


def cases() -> dict[str, dict[str, Any]]:
    """Calls with a batch of three, by name: arrays and options."""
    q, k, v = array(3, 4, 6), array(3, 7, 5), array(3, 7, 9)
    separate = {f"{x}_proj_weights": array(8, n) for x, n in zip("qkv", (6, 5, 9), strict=True)}
    packed = {"in_proj_weights": array(24, 6), "in_proj_bias": array(24)}
    out = {"out_proj_weights": array(5, 8), "out_proj_bias": array(5)}
    rows = {"bias_k": array(8), "bias_v": array(1, 1, 8)}
    plain = array(3, 7, 8)
    static = {"static_k": array(6, 9, 4), "static_v": array(6, 9, 4)}
    self_ = {"query": q}
    return {
        "packed": self_ | packed | out,
        "separate": {"query": q, "key": k, "value": v} | separate | {"in_proj_bias": array(24)} | out,
        "no projection": {"query": array(3, 4, 8), "key": plain, "value": array(3, 7, 8)},
        "out only": {"query": array(3, 4, 8), "key": plain, "value": plain} | out,
        "appended": self_ | packed | out | rows | {"add_zero_attn": True},
        "static": self_ | packed | out | static,
        "causal": self_ | packed | {"is_causal": True},
        "padding": self_ | packed | {"key_padding_mask": RNG.random((3, 4)) < 0.4},
        "float mask": self_ | packed | {"attention_mask": array(1, 4, 4)},
        "mask per head": self_ | packed | {"attention_mask": RNG.random((6, 4, 4)) < 0.4},
        "row mask": self_ | packed | {"attention_mask": array(1, 4)},
        "scale": self_ | packed | {"scale": -0.3},
        "dropout": self_ | packed | {"dropout": 0.5, "training": True},
    }  # fmt: skip


CASES = cases()


def call(arguments: dict[str, Any], **changes: Any) -> Any:
    merged = {"num_heads": 2} | arguments | changes
    return ivy.multi_head_attention_vjp(merged.pop("query"), **merged)


def sample(arguments: dict[str, Any], n: int) -> dict[str, Any]:
    """The call for one sample alone, with a batch of one."""
    per_sample = ("query", "key", "value", "key_padding_mask")
    made = {name: x[n : n + 1] if name in per_sample else x for name, x in arguments.items()}
    for name in ("static_k", "static_v", "attention_mask"):
        if name in made and made[name].shape[0] == 6:
            made[name] = made[name][2 * n : 2 * n + 2]
    return made


@pytest.mark.parametrize("name", [name for name in CASES if name != "dropout"])
def test_a_batch_equals_its_samples(name: str) -> None:
    """Ivy mixes them up."""
    arguments = CASES[name]
    for average in (True, False):
        options = {"return_attention_weights": True, "average_attention_weights": average}
        (output, weights), _ = call(arguments, **options)
        for n in range(3):
            (one, one_weights), _ = call(sample(arguments, n), **options)
            np.testing.assert_allclose(output[n], one[0], rtol=1e-11, atol=1e-13)
            np.testing.assert_allclose(weights[n], one_weights[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in CASES if "static" not in name])
def test_sequence_first_is_the_same_turned(name: str) -> None:
    arguments = CASES[name]
    turned = {n: x.swapaxes(0, 1) if n in ("query", "key", "value") else x for n, x in arguments.items()}
    mha.seed(0)
    output, backward = call(arguments)
    mha.seed(0)
    other, other_backward = call(turned, batch_first=False)
    np.testing.assert_allclose(other.swapaxes(0, 1), output, rtol=1e-12)
    up = array(*output.shape)
    gradients, others = backward(up), other_backward(up.swapaxes(0, 1))
    for n, x in gradients.items():
        np.testing.assert_allclose(others[n].swapaxes(0, 1) if n in turned and turned[n] is not arguments[n] else
                                   others[n], x, rtol=1e-10, atol=1e-12, err_msg=n)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_central_differences(name: str) -> None:
    arguments = CASES[name] | {"return_attention_weights": True}
    mha.seed(1)
    (output, weights), backward = call(arguments)
    ups = array(*output.shape), array(*weights.shape)
    gradients = backward(*ups, mask_gradients=True)
    floating = {n for n, x in arguments.items() if isinstance(x, np.ndarray) and x.dtype == np.float64}
    assert gradients.keys() == floating
    for n in floating:
        assert gradients[n].shape == arguments[n].shape
        direction, step = array(*arguments[n].shape), 1e-6
        sides = []
        for sign in (1, -1):
            mha.seed(1)
            found, _ = call(arguments | {n: arguments[n] + sign * step * direction})
            sides.append(sum((x * up).sum() for x, up in zip(found, ups, strict=True)))
        slope = (sides[0] - sides[1]) / (2 * step)
        assert abs(slope - (gradients[n] * direction).sum()) <= 1e-6 * max(1, abs(slope)), n


def test_padding_of_one_sample_is_for_all() -> None:
    arguments = CASES["packed"]
    padding = np.array([False, True, False, True])
    output = call(arguments, key_padding_mask=padding)[0]
    np.testing.assert_array_equal(output, call(arguments, key_padding_mask=np.stack([padding] * 3))[0])


def test_causal_replaces_the_mask_and_keeps_the_padding() -> None:
    arguments, padding = CASES["packed"], RNG.random((3, 4)) < 0.3
    output = call(arguments, is_causal=True, attention_mask=np.ones((4, 4), bool), key_padding_mask=padding)[0]
    expected = call(arguments, attention_mask=~np.tri(4, dtype=bool), key_padding_mask=padding)[0]
    np.testing.assert_array_equal(output, expected)


def test_out_takes_the_output() -> None:
    arguments = CASES["packed"]
    out = np.empty((3, 4, 5))
    found, weights = call(arguments, out=out, return_attention_weights=True)[0]
    assert found is out
    np.testing.assert_array_equal(out, call(arguments)[0])
    assert weights.shape == (3, 4, 4)
    with pytest.raises(ValueError, match=r"out is float64 \(3, 4, 4\)"):
        call(arguments, out=np.empty((3, 4, 4)))


def test_containers_run_leaf_by_leaf() -> None:
    queries = {"a": array(2, 4, 8), "b": {"c": array(5, 8), "d": array(1, 3, 8)}}
    masks = {"a": ~np.tri(4, dtype=bool), "b": {"c": np.zeros((5, 5), bool), "d": np.zeros((3, 3), bool)}}
    weights = {"in_proj_weights": array(24, 8), "out_proj_weights": array(3, 8)}
    (output, attention), backward = ivy.multi_head_attention_vjp(
        queries, num_heads=2, attention_mask=masks, return_attention_weights=True, **weights
    )
    leaves = {"a": ("a",), "b/c": ("b", "c"), "b/d": ("b", "d")}

    def at(tree: Any, path: tuple[str, ...]) -> Any:
        for key in path:
            tree = tree[key]
        return tree

    ups = {"a": array(2, 4, 3), "b": {"c": array(5, 3), "d": array(1, 3, 3)}}
    gradients = backward(ups)
    totals = {name: np.zeros_like(x) for name, x in weights.items()}
    for path in leaves.values():
        (right, right_weights), one = ivy.multi_head_attention_vjp(
            at(queries, path), num_heads=2, attention_mask=at(masks, path), return_attention_weights=True, **weights
        )
        np.testing.assert_array_equal(at(output, path), right)
        np.testing.assert_array_equal(at(attention, path), right_weights)
        made = one(at(ups, path))
        np.testing.assert_array_equal(at(gradients["query"], path), made["query"])
        for name in totals:
            totals[name] += made[name]
    for name, x in totals.items():
        np.testing.assert_allclose(gradients[name], x, rtol=1e-12)


def test_out_may_be_a_container() -> None:
    queries = {"a": array(2, 4, 8), "b": array(3, 8)}
    out = {"a": np.empty((2, 4, 8)), "b": np.empty((3, 8))}
    found = ivy.multi_head_attention(queries, out=out)
    for key, x in queries.items():
        assert found[key] is out[key]
        np.testing.assert_array_equal(out[key], ivy.multi_head_attention(x))


NESTED = {"a": array(4, 8), "ab": array(4, 8), "b": {"c": array(3, 8), "d": array(2, 8)}}


def applied(x: Any) -> Any:
    return ivy.multi_head_attention(x)


@pytest.mark.parametrize(
    ("chains", "to_apply", "on"),
    [(["a"], True, {"a"}), (["b"], True, {"c", "d"}), (["b/c"], True, {"c"}), (["b/c"], False, {"a", "ab", "d"}),
     (["a", "b/d"], False, {"ab", "c"}), ([], True, set()), ([], False, {"a", "ab", "c", "d"}),
     (None, True, {"a", "ab", "c", "d"})],
)  # fmt: skip
def test_key_chains_choose_the_leaves(chains: Any, to_apply: bool, on: set[str]) -> None:
    found, backward = ivy.multi_head_attention_vjp(NESTED, key_chains=chains, to_apply=to_apply)
    assert found.keys() == NESTED.keys()
    flat, original = {**found, **found["b"]}, {**NESTED, **NESTED["b"]}
    for key in ("a", "ab", "c", "d"):
        if key in on:
            np.testing.assert_array_equal(flat[key], applied(original[key]))
        else:
            assert flat[key] is original[key]
    gradients = backward(NESTED)["query"]
    flat_gradients = {**gradients, **gradients["b"]}
    for key in ("a", "ab", "c", "d"):
        assert (flat_gradients[key] is original[key]) == (key not in on)


def test_pruned_leaves_are_left_out() -> None:
    found = ivy.multi_head_attention(NESTED, key_chains=["a", "b/d"], prune_unapplied=True)
    assert found.keys() == {"a", "b"}
    assert found["b"].keys() == {"d"}
    found, backward = ivy.multi_head_attention_vjp(NESTED, key_chains=["a"], prune_unapplied=True)
    assert found.keys() == {"a"}
    assert backward({"a": NESTED["a"]})["query"].keys() == {"a"}


def test_unapplied_leaves_have_no_weights() -> None:
    output, weights = ivy.multi_head_attention(NESTED, key_chains=["a"], return_attention_weights=True)
    assert weights["a"].shape == (4, 4)
    assert weights["b"] == {"c": None, "d": None}
    assert output["b"]["c"] is NESTED["b"]["c"]


def test_sequences_are_containers_on_request() -> None:
    parts = [array(4, 8), array(3, 8)]
    nested = {"a": parts, "b": array(2, 8)}
    found, backward = ivy.multi_head_attention_vjp(nested, map_sequences=True)
    assert isinstance(found["a"], list)
    for x, right in zip(found["a"], parts, strict=True):
        np.testing.assert_array_equal(x, applied(right))
    gradients = backward(found)["query"]
    assert [x.shape for x in gradients["a"]] == [(4, 8), (3, 8)]
    chosen = ivy.multi_head_attention(nested, map_sequences=True, key_chains=["a/1"], prune_unapplied=True)
    assert len(chosen["a"]) == 1
    with pytest.raises(TypeError, match="list"):
        ivy.multi_head_attention(nested)


def test_containers_have_the_same_keys() -> None:
    with pytest.raises(ValueError, match=r"different keys.*'a'.*'b'"):
        ivy.multi_head_attention({"a": array(4, 8)}, key={"b": array(4, 8)}, value={"b": array(4, 8)})
    with pytest.raises(ValueError, match="in 'a'"):
        ivy.multi_head_attention({"a": {"x": array(4, 8)}}, attention_mask={"a": {"y": array(4, 4)}})


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("weights", [{}, {"in_proj_weights": array(24, 8)}])
def test_sizes_of_zero(sizes: tuple[int, int, int], weights: dict[str, Any]) -> None:
    batch, queries, keys = sizes
    (output, attention), backward = ivy.multi_head_attention_vjp(
        array(batch, queries, 8), key=array(batch, keys, 8), value=array(batch, keys, 8), num_heads=2,
        return_attention_weights=True, **weights,
    )  # fmt: skip
    assert output.shape == (batch, queries, 8)
    assert attention.shape == (batch, queries, keys)
    assert not output.any()
    gradients = backward(np.ones_like(output))
    assert gradients["key"].shape == (batch, keys, 8)
    assert all(np.isfinite(x).all() for x in gradients.values())


def test_signature_is_ivys() -> None:
    parameters = list(inspect.signature(ivy.multi_head_attention).parameters.values())
    assert parameters[0].kind is inspect.Parameter.POSITIONAL_ONLY
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[1:])
    assert [(p.name, p.default) for p in parameters[1:26]] == [
        ("key", None), ("value", None), ("batch_first", True), ("num_heads", 8), ("scale", None),
        ("attention_mask", None), ("in_proj_weights", None), ("q_proj_weights", None), ("k_proj_weights", None),
        ("v_proj_weights", None), ("out_proj_weights", None), ("in_proj_bias", None), ("out_proj_bias", None),
        ("is_causal", False), ("key_padding_mask", None), ("bias_k", None), ("bias_v", None), ("static_k", None),
        ("static_v", None), ("add_zero_attn", False), ("return_attention_weights", False),
        ("average_attention_weights", True), ("dropout", 0.0), ("training", False), ("out", None),
    ]  # fmt: skip


def test_module_with_one_width_is_torchs() -> None:
    layer = ivy.MultiHeadAttention(8, num_heads=2, dtype="float64")
    assert layer.v is not None
    assert {name: x.shape for name, x in layer.v.items()} == {
        "out_proj_weights": (8, 8), "in_proj_weights": (24, 8), "in_proj_bias": (24,), "out_proj_bias": (8,),
    }  # fmt: skip
    theirs = torch.MultiheadAttention(8, 2, batch_first=True, dtype="float64")
    names = {"in_proj_weights": "in_proj_weight", "out_proj_weights": "out_proj.weight",
             "in_proj_bias": "in_proj_bias", "out_proj_bias": "out_proj.bias"}  # fmt: skip
    theirs.load_state_dict({names[name]: x for name, x in layer.v.items()})
    x, y = array(3, 4, 8), array(3, 5, 8)
    output, weights = layer(x, y, y, is_causal=True, return_attention_weights=True, average_attention_weights=False)
    right, right_weights = theirs(x, y, y, is_causal=True, average_attn_weights=False)
    np.testing.assert_array_equal(output, right)
    np.testing.assert_array_equal(weights, right_weights)
    ours, others = layer.backward(output, weights), theirs.backward(output, weights)
    for one, other in zip(ours[:3], others[:3], strict=True):
        np.testing.assert_array_equal(one, other)
    for name, gradient in ours.parameters.items():
        np.testing.assert_array_equal(gradient, others.parameters[names[name]])
    with pytest.raises(RuntimeError):
        layer.backward(output)


def test_module_sizes() -> None:
    layer = ivy.MultiHeadAttention(6, key_dim=5, value_dim=3, num_heads=2, head_dim=4, use_proj_bias=False)
    assert {name: x.shape for name, x in layer.state_dict().items()} == {
        "out_proj_weights": (6, 8), "q_proj_weights": (8, 6), "k_proj_weights": (8, 5), "v_proj_weights": (8, 3),
    }  # fmt: skip
    output = layer(*(array(2, 4, n).astype("f4") for n in (6, 5, 3)))
    assert output.shape == (2, 4, 6)
    assert layer.backward(output).parameters["v_proj_weights"].shape == (8, 3)
    assert ivy.MultiHeadAttention(num_heads=3, head_dim=4).embed_dim == 12
    assert ivy.MultiHeadAttention(12, num_heads=None, head_dim=4).num_heads == 3
    for bad in (lambda: ivy.MultiHeadAttention(), lambda: ivy.MultiHeadAttention(9, num_heads=2),
                lambda: ivy.MultiHeadAttention(9, num_heads=-3), lambda: ivy.MultiHeadAttention(8, build_mode="now"),
                lambda: ivy.MultiHeadAttention(9, num_heads=None, head_dim=2)):  # fmt: skip
        with pytest.raises(ValueError, match=r"embed_dim|build_mode"):
            bad()


def test_module_builds_when_asked() -> None:
    x = np.ones((2, 3, 8), np.float32)
    layer = ivy.MultiHeadAttention(8, build_mode="on_call")
    assert layer.v is None
    layer(x)
    assert layer.v is not None
    layer = ivy.MultiHeadAttention(8, build_mode="explicit")
    with pytest.raises(RuntimeError, match="build"):
        layer(x)
    layer.build()
    variables = layer.state_dict()
    again = ivy.MultiHeadAttention(8, v=variables)
    np.testing.assert_array_equal(again(x), layer(x))
    with pytest.raises(ValueError, match=r"v has"):
        ivy.MultiHeadAttention(8, v={"in_proj_weights": variables["in_proj_weights"]})


def test_module_as_an_object() -> None:
    layer = ivy.MultiHeadAttention(8, num_heads=2, dropout_rate=0.5, scale=0.3, training=False, dtype="float64")
    x = array(2, 3, 8)
    np.testing.assert_array_equal(layer(x), layer(x))
    layer.train()
    assert not np.allclose(layer(x), layer(x))
    assert repr(eval(repr(layer), vars(ivy))) == repr(layer)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        np.testing.assert_array_equal(other.eval()(x), layer.eval()(x))
        layer.train()


def test_module_masks() -> None:
    layer = ivy.MultiHeadAttention(8, num_heads=2, device="cpu", attention_axes=(1, 2), dtype="float64")
    x, mask = array(2, 3, 8), array(3, 3)
    output = layer(x, attention_mask=mask)
    np.testing.assert_array_equal(
        output, ivy.multi_head_attention(x, num_heads=2, attention_mask=mask, **layer.state_dict())
    )
    gradient = layer.backward(output, mask_gradients=True).attn_mask
    assert gradient is not None
    assert gradient.shape == (3, 3)
    assert np.abs(gradient.sum(axis=1)).max() < 1e-12 < np.abs(gradient).max()
