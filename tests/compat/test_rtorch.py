"""compat.rtorch: the recordings of PyTorch that R shares, and what its documentation says beyond them."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from recorded_torch import NAMES, Recorded, check

import mha
from mha.compat import rtorch as compat
from mha.compat import torch


def shared(name: str) -> bool:
    """R has no causal flag, no unbatched input and no SDPA; rows without keys are the package's own decision."""
    case = Recorded(name)
    return (
        case.api != "sdpa" and "is_causal" not in case.meta["call"] and case.inputs["query"].ndim == 3
        and case.meta["mode"] == "eval" and name[:3] not in ("n01", "n06")
    )  # fmt: skip


SHARED = [name for name in NAMES if shared(name)]


def arguments(case: Recorded) -> dict[str, Any]:
    ctor = case.meta["ctor"]
    named: dict[str, Any] = dict.fromkeys(("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj_bias"))
    named |= {name.replace(".", "_"): x for name, x in case.parameters.items()}
    call = dict(case.meta["call"])
    if "average_attn_weights" in call:
        call["avg_weights"] = call.pop("average_attn_weights")
    return case.own() | named | call | {
        "embed_dim_to_check": float(ctor["embed_dim"]), "num_heads": float(ctor["num_heads"]), "dropout_p": 0,
        "add_zero_attn": ctor.get("add_zero_attn", False), "batch_first": ctor.get("batch_first", False),
        "use_separate_proj_weight": "q_proj_weight" in case.parameters,
    }  # fmt: skip


def test_most_recordings_are_shared() -> None:
    assert len(SHARED) >= 40


@pytest.mark.parametrize("name", SHARED)
def test_function_equals_torch(name: str) -> None:
    case = Recorded(name)
    (output, weights), backward = compat.nnf_multi_head_attention_forward_vjp(**arguments(case))
    gradients = {}
    if case.up:
        gradients = backward(case.up["output"], case.up.get("weights"), mask_gradients=True)
        gradients = {name.replace("out_proj_", "out_proj."): x for name, x in case.summed(gradients).items()}
    check(case, output, weights, gradients)


@pytest.mark.parametrize("name", [name for name in SHARED if Recorded(name).api == "module"])
def test_module_equals_torch(name: str) -> None:
    case = Recorded(name)
    layer = compat.nn_multihead_attention(**case.meta["ctor"], dtype=case.inputs["query"].dtype)
    layer.load_state_dict(case.parameters)
    call = {n.replace("average_attn_weights", "avg_weights"): x for n, x in case.meta["call"].items()}
    layer.dropout = 0.0
    output, weights = layer(**case.own(), **call)
    gradients = case.gradients_of(layer) if case.up else {}
    if "attn_mask" in gradients and gradients["attn_mask"] is not None:
        gradients["attn_mask"] = gradients["attn_mask"].reshape(case.inputs["attn_mask"].shape)
    check(case, output, weights, gradients)


def layer(**options: Any) -> compat.nn_multihead_attention:
    return compat.nn_multihead_attention(8, 2, dtype="float64", **options)


RNG = np.random.default_rng(0)
X = RNG.standard_normal((5, 3, 8))


def test_bytes_are_flags() -> None:
    made = layer()
    pairs, padding = np.triu(np.full((5, 5), 3, "u1"), 1), np.zeros((3, 5), "u1")
    padding[1, 2:] = 1
    for found, right in zip(made(X, X, X, padding, True, pairs), made(X, X, X, padding != 0, True, pairs != 0),
                            strict=True):  # fmt: skip
        np.testing.assert_array_equal(found, right)
    np.testing.assert_allclose(made(X, X, X)[1].sum(-1), 1)
    with pytest.raises(TypeError, match="int64"):
        made(X, X, X, attn_mask=np.zeros((5, 5), int))


@pytest.mark.parametrize("shape", [(1, 5, 5), (5, 1), (1, 5), (6, 1, 5), (1, 1, 5)])
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    """To (N*H, L, S); their gradients have their own shape."""
    mask = RNG.standard_normal(shape)
    full = np.broadcast_to(mask, (6, 5, 5))
    names = dict(in_proj_weight=RNG.standard_normal((24, 8)), out_proj_weight=RNG.standard_normal((8, 8)))
    names |= dict.fromkeys(("in_proj_bias", "bias_k", "bias_v", "out_proj_bias"))
    options = dict(embed_dim_to_check=8, num_heads=2, add_zero_attn=True, dropout_p=0.0)
    results = []
    for each in (mask, full):
        (output, weights), backward = compat.nnf_multi_head_attention_forward_vjp(
            X, X, X, **names, **options, attn_mask=each
        )
        results.append((output, weights, backward(output, mask_gradients=True)["attn_mask"]))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-12)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-12)
    gradient = results[1][2].reshape(6, 5, 5)
    padded = (1,) * (3 - len(shape)) + shape
    axes = tuple(i for i in range(3) if padded[i] == 1)
    np.testing.assert_allclose(
        results[0][2], gradient.sum(axis=axes, keepdims=True).reshape(shape), rtol=1e-9, atol=1e-12
    )


def test_zeros_are_appended_to_key_and_value() -> None:
    """In R the call fails."""
    made = layer(add_zero_attn=True)
    weights = made(X, X, X, avg_weights=False)[1]
    assert weights.shape == (3, 2, 5, 6)
    theirs = torch.MultiheadAttention(8, 2, add_zero_attn=True, dtype="float64")
    theirs.load_state_dict(made.state_dict())
    np.testing.assert_array_equal(weights, theirs(X, X, X, average_attn_weights=False)[1])


def test_weights_per_head_with_other_widths() -> None:
    """In R they are averaged whatever `avg_weights` says."""
    made = layer(kdim=8.0, vdim=6.0)
    assert made(X, X, X[..., :6], avg_weights=False)[1].shape == (3, 2, 5, 5)


def test_a_row_without_keys_gives_the_output_bias() -> None:
    made = layer()
    assert made.out_proj.bias is not None
    made.out_proj.bias[...] = np.arange(8)
    for need_weights in (True, False):
        output, _ = made(X, X, X, np.ones((3, 5), bool), need_weights)
        np.testing.assert_array_equal(output, np.broadcast_to(np.arange(8.0), X.shape))


def test_numbers_are_rs() -> None:
    mha.seed(0)
    made = compat.nn_multihead_attention(32.0, 8.0)
    assert (made.embed_dim, made.num_heads, made.head_dim) == (32, 8, 4)
    assert made.out_proj.weight.dtype == np.float32
    before = made.out_proj.weight.copy()
    made.reset_parameters()
    assert (made.out_proj.weight != before).any()
    with pytest.raises(ValueError, match="divisible"):
        compat.nn_multihead_attention(512, 10)
    with pytest.raises(ValueError, match="no whole number"):
        compat.nn_multihead_attention(8, 2.5)


def test_signatures_are_rs() -> None:
    names = list(inspect.signature(compat.nnf_multi_head_attention_forward).parameters)
    theirs = list(inspect.signature(torch.multi_head_attention_forward).parameters)
    theirs = [name for name in theirs if name not in ("average_attn_weights", "is_causal")]
    theirs.insert(theirs.index("use_separate_proj_weight"), "avg_weights")
    assert names == [*theirs, "batch_first"]
    call = list(inspect.signature(compat.nn_multihead_attention.forward).parameters)
    assert call == ["self", "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "avg_weights"]


def test_lists_work_here_too() -> None:
    made = layer(batch_first=True)
    parts = [RNG.standard_normal((n, 8)) for n in (2, 4)]
    outputs, weights = made(parts, parts, parts)
    for x, output, weight in zip(parts, outputs, weights, strict=True):
        np.testing.assert_allclose(output, made(x, x, x)[0], rtol=1e-11, atol=1e-13)
        assert weight.shape == (len(x), len(x))


# What the package's own testthat files check: sizes, and one layer that starts from R's seed.
@pytest.mark.parametrize("kind", ["self", "one head count", "two", "three"])
def test_sizes_of_testthat(kind: str) -> None:
    made = compat.nn_multihead_attention(32, 8)
    x, y, z = (RNG.standard_normal((5, 8, 32)).astype("f4") for _ in range(3))
    inputs = {"self": (x, x, x), "one head count": (x, x, x), "two": (x, y, y), "three": (x, y, z)}[kind]
    averaged = kind != "one head count"
    output, weights = made(*inputs, avg_weights=averaged)
    assert output.shape == (5, 8, 32)
    assert weights.shape == ((8, 5, 5) if averaged else (8, 8, 5, 5))


def test_dropout_is_for_training() -> None:
    weights = dict(in_proj_weight=RNG.standard_normal((24, 8)), out_proj_weight=RNG.standard_normal((8, 8)))
    given = weights | dict.fromkeys(("in_proj_bias", "bias_k", "bias_v", "out_proj_bias"))
    options = dict(embed_dim_to_check=8, num_heads=2, add_zero_attn=False, dropout_p=0.5)
    for training in (True, False):
        first, second = (
            compat.nnf_multi_head_attention_forward(X, X, X, **given, **options, training=training)[0] for _ in range(2)
        )
        assert np.allclose(first, second) != training


def test_where_and_what_the_arrays_are() -> None:
    assert compat.nn_multihead_attention(8, 2, device="cpu", dtype="float16").out_proj.weight.dtype == np.float16
