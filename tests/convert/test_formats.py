"""Every format against its own formula on the raw tensors, round trips bit for bit, and what it has no place for."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import mha
from mha import convert
from mha.convert import FROM, TO, PackedParameters
from mha.optional import bfloat16

from .layers import (
    ALWAYS_BIASED,
    GROUPED,
    NEVER_BIASED,
    NO_OUTPUT,
    ONLY_OUTPUT_BIASED,
    OUTPUT_BIASED,
    PROJECTIONS,
    TOGETHER_BIASED,
    UNSCALED,
    answer,
    for_format,
    random_layer,
)

WRITTEN = list(TO)
DTYPES = ["float16", "float32", "float64"] + ([] if bfloat16 is None else [bfloat16])


def read(name: str, state: dict[str, Any], parameters: PackedParameters, **options: Any) -> PackedParameters:
    reader = FROM["paddle" if name.startswith("paddle") else name]
    return reader(state, parameters.layout.num_heads, num_kv_heads=parameters.layout.num_kv_heads, **options)


def same(a: PackedParameters, b: PackedParameters) -> bool:
    bits = [(x is None, b"" if x is None else x.tobytes()) for p in (a, b) for x in (p[0], p.bias_k, p.bias_v)]
    return a.layout == b.layout and a.scale == b.scale and a[0].dtype == b[0].dtype and bits[:3] == bits[3:]


def quietly(name: str, parameters: PackedParameters, **options: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return TO[name](parameters, **options)


def test_the_formulas_cover_every_format() -> None:
    assert set(PROJECTIONS) == set(TO)
    assert set(FROM) == set(TO) - {"paddle_flat", "paddle_nn"}
    for name in TO:
        assert getattr(convert, f"to_{name}") is TO[name]
    for name in FROM:
        assert getattr(convert, f"from_{name}") is FROM[name]
        assert getattr(mha.MultiHeadAttention, f"from_{name}").__doc__


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", WRITTEN)
def test_computes_what_the_format_means(name: str, bias: bool) -> None:
    parameters = for_format(name, bias=bias, kv_heads=2 if name in GROUPED else None)
    layout = parameters.layout
    # The tensors are filled without a look at what the writer put there.
    rng = np.random.default_rng(1)
    state = {key: (rng.standard_normal(x.shape) / 3).astype("f4") for key, x in TO[name](parameters).items()}
    x = rng.standard_normal((7, layout.embed_dim)).astype("f4")
    expected = answer(name, state, x.astype("f8"), layout.num_heads, layout.num_kv_heads)
    made = read(name, state, parameters)
    found = mha.multi_head_attention(x, x, x, attn_drop=0.0, out_drop=0.0, training=False, **made.options).attn_output
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", WRITTEN)
def test_round_trip_is_exact(name: str, bias: bool, dtype: Any) -> None:
    for kv_heads in (4, 2, 1) if name in GROUPED else (4,):
        parameters = for_format(name, bias=bias, kv_heads=kv_heads, dtype=dtype)
        before = {f"a.b.{key}": x.copy() for key, x in TO[name](parameters).items()}
        made = read(name, before | {"a.c": 0}, parameters, prefix="a.b.")
        assert same(made, parameters)
        after = TO[name](made, "a.b.")
        assert list(after) == list(before)
        for key, x in before.items():
            assert (after[key].dtype, after[key].shape) == (x.dtype, x.shape)
            assert after[key].tobytes() == x.tobytes(), key
        assert not any(np.shares_memory(x, made[0]) for x in before.values()), "reading copies"


def biases_of(target: str, biased: set[str]) -> tuple[set[str], set[str]]:
    """Which projections of a format may have a bias, and which must in a layer that has these."""
    possible = set("" if target in NEVER_BIASED else "o" if target in ONLY_OUTPUT_BIASED else "qkvo")
    possible -= set("o" if target in NO_OUTPUT else "")
    if target in ALWAYS_BIASED or (target in TOGETHER_BIASED and biased):
        return possible, possible
    return possible, set("o" if target in OUTPUT_BIASED else "")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", WRITTEN)
@pytest.mark.parametrize("source", WRITTEN)
def test_all_ordered_pairs(source: str, target: str, bias: bool) -> None:
    """x -> packed -> y -> packed, or the reason why y cannot hold it."""
    original = for_format(source, bias=bias)
    packed = read(source, quietly(source, original), original)
    assert same(packed, original)
    biased = {x for x in "qkvo" if getattr(packed.layout, f"{x}bias")}
    possible, needed = biases_of(target, biased)
    lacking = [
        ("biases have no place", not biased <= possible),
        ("no output projection", (packed.layout.oproj_size > 0) != (target not in NO_OUTPUT)),
        ("the scale is", (source in UNSCALED) != (target in UNSCALED)),
    ]
    reasons = [reason for reason, applies in lacking if applies]
    if reasons:
        with pytest.raises(ValueError, match="cannot hold this layer") as error:
            TO[target](packed)
        assert all(reason in str(error.value) for reason in reasons)
        return
    if not needed <= biased:
        with pytest.warns(UserWarning, match="zeros stand for"):
            state = TO[target](packed)
        made = read(target, state, packed)
        views, expected = (p.layout.views(p[0]) for p in (made, packed))
        assert all((x == expected[key]).all() if key in expected else not x.any() for key, x in views.items())
        return
    assert same(read(target, TO[target](packed), packed), packed)


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - GROUPED))
def test_grouped_heads_have_no_place(name: str) -> None:
    parameters = for_format(name, kv_heads=2)
    with pytest.raises(ValueError, match="num_kv_heads 2 is not num_heads 4"):
        quietly(name, parameters)


@pytest.mark.parametrize("name", WRITTEN)
def test_other_properties_that_have_no_place(name: str) -> None:
    scale = 1.0 if name in UNSCALED else None
    one_bias = random_layer(bias=False, output=name not in NO_OUTPUT, scale=scale, kbias=True)
    separate = {"keras", "flax", "hf_bert", "hf_vit", "hf_bart", "llama", "paddle_nn"}
    if name in ("hf_bart", "llama"):
        assert same(read(name, TO[name](one_bias), one_bias), one_bias)
    elif name in ALWAYS_BIASED | (TOGETHER_BIASED & separate):
        with pytest.warns(UserWarning, match="query, value"):
            TO[name](one_bias)
    elif name in OUTPUT_BIASED & separate:
        with pytest.warns(UserWarning, match="always has biases: zeros stand for those of output"):
            TO[name](one_bias)
    else:
        nowhere = NEVER_BIASED | ONLY_OUTPUT_BIASED
        reason = "biases have no place" if name in nowhere else "only some have a bias .*qbias False, kbias True"
        with pytest.raises(ValueError, match=reason):
            TO[name](one_bias)
    appended = for_format(name)
    appended = appended._replace(bias_k=np.ones((1, 1, 12), "f4"), bias_v=np.ones((1, 1, 12), "f4"))
    if name in ("torch", "ivy"):
        assert same(read(name, TO[name](appended), appended), appended)
    else:
        with pytest.raises(ValueError, match="bias_k and bias_v have no place"):
            quietly(name, appended)
    scaled = for_format(name)._replace(scale=0.25)
    with pytest.raises(ValueError, match=r"the scale is 0.25"):
        quietly(name, scaled)
    widths = for_format(name, kdim=5)
    if name in separate | {"torch", "ivy", "t5", "gpt_neo"}:
        assert same(read(name, TO[name](widths), widths), widths)
    else:
        with pytest.raises(ValueError, match="kdim 5 is not embed_dim 12"):
            quietly(name, widths)


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - {"torch"}))
def test_heads_wider_than_the_model(name: str) -> None:
    """H * D is not E: Gemma, Flan-T5, Keras's key_dim."""
    parameters = for_format(name, width=5, embed_dim=12)
    made = read(name, quietly(name, parameters), parameters)
    assert same(made, parameters)
    x = np.random.default_rng(0).standard_normal((2, 3, 12)).astype("f4")
    layer = mha.MultiHeadAttention.from_parameters(made).eval()
    state = {key: y.astype("f8") for key, y in quietly(name, parameters).items()}
    for i in range(2):
        expected = answer(name, state, x[i].astype("f8"), 4, 4)
        np.testing.assert_allclose(layer(x, x, x)[0][i], expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["torch", "ivy"])
def test_modules_that_have_all_biases_or_none(name: str) -> None:
    """Such a module could not load a state with some of them."""
    parameters = random_layer(obias=False)
    with pytest.warns(UserWarning, match="has all biases or none: zeros stand for those of output"):
        state = TO[name](parameters)
    bias = "out_proj.bias" if name == "torch" else "out_proj_bias"
    assert (state.pop(bias) == np.zeros(12, "f4")).all()
    assert same(read(name, state, parameters), parameters)


def test_views_where_axes_allow() -> None:
    parameters = random_layer()
    for name in ("llama", "keras", "hf_bert", "paddle_nn"):
        assert all(np.shares_memory(x, parameters[0]) for x in TO[name](parameters).values())
    shared = {key for key, x in convert.to_torch(parameters).items() if np.shares_memory(x, parameters[0])}
    assert shared == {"out_proj.weight", "out_proj.bias"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", {"c_attn.weight": np.ones((12, 35), "f4")}, r"c_attn.weight has shape \(12, 35\).*4 query, 4 key"),
        ("gpt2", {"c_attn.bias": np.ones(35, "f4")}, r"c_attn.bias has shape \(35,\)"),
        ("gpt2", {"c_attn.weight": np.ones(36, "f4")}, r"c_attn.weight has shape \(36,\), not the axes \(in, out\)"),
        ("gpt2", {"lora_A": np.ones(1, "f4")}, r"not understood \['lora_A'\]"),
        ("gpt2", {"c_proj.weight": np.ones((13, 12), "f4")}, "c_proj.weight takes 13 in-features"),
        ("llama", {"q_norm.weight": np.ones(3, "f4")}, r"not understood \['q_norm.weight'\]"),
        (
            "llama",
            {"k_proj.weight": np.ones((10, 12), "f4"), "k_proj.bias": None},
            "kproj_size 10 is not divisible by its 4 heads",
        ),
        (
            "keras",
            {"query/kernel": np.ones((12, 3, 4), "f4")},
            r"query heads are not one number: num_heads 4, query/kernel \(12, 3, 4\) 3",
        ),
        ("t5", {"o.weight": None}, r"missing \['o.weight'\]"),
        ("paddle", {"qkv_weight": np.ones((4, 4, 3, 12), "f4")}, r"not the axes \(3, heads, width, in\)"),
        ("paddle", {"qkv_bias": np.ones((3, 6, 2), "f4")}, r"qkv_bias \(3, 6, 2\) 6"),
        ("keras", {"key/bias": np.ones((3, 4), "f4")}, r"key heads are not one number: .*key/bias \(3, 4\) 3"),
        ("llama", {"q_layernorm.weight": np.ones(12, "f4")}, r"not understood \['q_layernorm.weight'\]"),
    ],
)
def test_states_that_do_not_fit(name: str, change: dict[str, Any], message: str) -> None:
    state = TO[name](for_format(name)) | change
    with pytest.raises(ValueError, match=message):
        FROM[name](state, 4)


def test_heads_that_are_not_said() -> None:
    with pytest.raises(ValueError, match=r"does not say how many heads there are. Give num_heads"):
        convert.from_gpt2(convert.to_gpt2(for_format("gpt2")))
    assert convert.from_keras(convert.to_keras(for_format("keras"))).layout.num_heads == 4
    assert convert.from_paddle(convert.to_paddle(for_format("paddle"))).layout.num_heads == 4
    with pytest.raises(ValueError, match="so to 4 query heads 4 key heads, not 2"):
        convert.from_bloom(convert.to_bloom(for_format("bloom")), 4, num_kv_heads=2)


def test_heads_that_are_no_number() -> None:
    state = convert.to_llama(for_format("llama"))
    for given in ("4", 4.0, np.ones(1)):
        with pytest.raises(TypeError, match=r"a number of heads is .* Give an int"):
            convert.from_llama(state, given)  # type: ignore[arg-type]
    assert same(convert.from_llama(state, np.int64(4)), for_format("llama"))  # type: ignore[arg-type]
    mqa = for_format("falcon_mqa", kv_heads=1)
    assert same(convert.from_falcon_mqa(convert.to_falcon_mqa(mqa), 4), mqa), "it has one key head"


def test_big_endian_tensors() -> None:
    parameters = for_format("llama")
    state = {name: x.astype(">f4") for name, x in convert.to_llama(parameters).items()}
    assert same(convert.from_llama(state, 4), parameters)


def test_nested_mappings() -> None:
    state = convert.to_flax(for_format("flax"))
    nested: dict[str, Any] = {"params": {"block": {}}}
    for key, x in state.items():
        name, kind = key.split("/")
        nested["params"]["block"].setdefault(name, {})[kind] = x
    assert same(convert.from_flax(nested, prefix="params/block/"), for_format("flax"))


def test_what_lies_beside() -> None:
    parameters = for_format("gpt2")
    state = convert.to_gpt2(parameters) | {"bias": np.ones((1, 1, 9, 9), bool), "masked_bias": np.float32(-1e4)}
    assert same(convert.from_gpt2(state, 4), parameters)
    rotary = {f"rotary_emb.{x}": np.ones((9, 3), "f4") for x in ("inv_freq", "cos_cached", "sin_cached")}
    parameters = for_format("llama")
    assert same(convert.from_llama(convert.to_llama(parameters) | rotary, 4), parameters)
    parameters = for_format("flax")
    assert same(convert.from_flax(convert.to_flax(parameters) | {"rngs/dropout/count": np.uint32(1)}, 4), parameters)
    parameters = for_format("t5")
    state = convert.to_t5(parameters) | {"relative_attention_bias.weight": np.ones((32, 4), "f4")}
    assert same(convert.from_t5(state, 4), parameters)
    assert parameters.scale == 1.0
