"""Formats are recognised by names, refused where names are not enough, and held to a probe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mha
from mha.convert import FROM, TO, PackedParameters, Probe, auto, find_layers

from .layers import answer, for_format
from .test_formats import same

FUSED = ("gpt_neox", "bloom", "megatron_v2", "megatron_v1", "megatron_v0", "falcon", "falcon_mqa")
#: q_proj, k_proj, v_proj and out_proj: Hugging Face's, and GPT-Neo's and Paddle's too.
ALIKE = ("hf_bart", "gpt_neo", "paddle")
KNOWN = sorted(set(FROM) - set(FUSED) - set(ALIKE) | {"paddle"})


def probe_of(name: str, parameters: PackedParameters, seed: int = 0) -> Probe:
    x = np.random.default_rng(seed).standard_normal((5, parameters.layout.embed_dim)).astype("f4")
    return Probe(x, answer(name, TO[name](parameters), x.astype("f8"), 4, parameters.layout.num_kv_heads))


@pytest.mark.parametrize("name", KNOWN)
def test_names_say_the_format(name: str) -> None:
    parameters = for_format(name)
    state: dict[str, Any] = dict(TO[name](parameters, "model.attn."))
    assert find_layers(state | {"model.norm.weight": np.ones(3)}) == {"model.attn.": [name]}
    assert same(auto(state, 4, "model.attn.", verify=probe_of(name, parameters)), parameters)


@pytest.mark.parametrize("name", FUSED)
def test_names_that_several_formats_have(name: str) -> None:
    parameters = for_format(name)
    state = TO[name](parameters)
    assert set(find_layers(state)[""]) == set(FUSED)
    with pytest.raises(ValueError, match=r"are those of gpt_neox, bloom, .* Call from_gpt_neox or"):
        auto(state, 4)
    assert same(auto(state, 4, verify=probe_of(name, parameters)), parameters)


@pytest.mark.parametrize("name", ["hf_bart", "gpt_neo", "paddle_nn"])
def test_names_that_more_than_one_system_has(name: str) -> None:
    parameters = for_format(name)
    state, only_output = TO[name](parameters), name == "gpt_neo"
    possible = ["hf_bart", "paddle"] if not only_output else ["hf_bart", "gpt_neo", "paddle"]
    assert sorted(find_layers(state)[""]) == sorted(possible)
    with pytest.raises(ValueError, match=r"are those of .*hf_bart.* Call .*or give model_type or verify"):
        auto(state, 4)
    x = np.random.default_rng(0).standard_normal((5, 12)).astype("f4")
    probe = Probe(x, answer(name, state, x.astype("f8"), 4, 4))
    assert same(auto(state, 4, verify=probe), parameters)
    if name != "paddle_nn":
        assert same(auto(state, 4, model_type="gpt_neo" if only_output else "whisper"), parameters)
    assert same(FROM["paddle" if name == "paddle_nn" else name](state, 4), parameters)


@pytest.mark.parametrize(("model_type", "name"), [("gpt_neox", "gpt_neox"), ("bloom", "bloom"), ("falcon", "falcon"),
                                                  ("falcon_mqa", "falcon_mqa"), ("falcon_rw", "gpt_neox")])  # fmt: skip
def test_the_type_of_a_model_decides(model_type: str, name: str) -> None:
    parameters = for_format(name)
    assert same(auto(TO[name](parameters), 4, model_type=model_type, num_kv_heads=4), parameters)
    with pytest.raises(ValueError, match="are those of gpt_neox"):
        auto(TO[name](parameters), 4, model_type="another")


def test_a_state_that_reads_alike_in_all_formats() -> None:
    state = TO["bloom"](for_format("bloom", heads=1, width=1))
    assert same(auto(state, 1), FROM["bloom"](state, 1))


def test_many_layers() -> None:
    state: dict[str, Any] = {}
    for i in range(3):
        state |= TO["hf_bert"](for_format("hf_bert", i), f"encoder.layer.{i}.attention.")
        state |= TO["llama"](for_format("llama", i), f"decoder.layers.{i}.self_attn.")
    layers = find_layers(state)
    assert len(layers) == 6
    assert layers["encoder.layer.2.attention."] == ["hf_bert"]
    for i in range(3):
        assert same(auto(state, 4, f"decoder.layers.{i}.self_attn."), for_format("llama", i))
    with pytest.raises(ValueError, match=r"no format has the names .* Layers are under \['encoder.layer.0.attention.'"):
        auto(state, 4)
    with pytest.raises(ValueError, match="No layer of a known format is in this state"):
        auto({"weight": np.ones((3, 3))}, 1)


def test_formats_of_one_system_go_by_its_name() -> None:
    for name, options in (("torch", {"kdim": 5}), ("ivy", {"kdim": 5}), ("paddle", {})):
        parameters = for_format(name, **options)
        state = TO["paddle_flat" if name == "paddle" else name](parameters)
        assert find_layers(state) == {"": [name]}
        assert same(auto(state, 4), parameters)


def test_words_are_not_cut() -> None:
    state = TO["t5"](for_format("t5"), "tiq")
    assert find_layers(state) == {}
    assert find_layers(TO["t5"](for_format("t5"), "a/")) == {"a/": ["t5"]}


def test_an_answer_that_is_another_layers() -> None:
    parameters = for_format("llama")
    state = TO["llama"](parameters)
    right = probe_of("llama", parameters)
    for wrong, heads in ((right._replace(output=right.output + 0.01), 4), (right, 2), (right, 12)):
        with pytest.raises(ValueError, match=r"does not answer what verify says: relative differences .*llama"):
            auto(state, heads, verify=wrong)
    with pytest.raises(ValueError, match="inf"):
        auto(state, 4, verify=right._replace(output=right.output[:3]))
    assert same(auto(state, 4, verify=right._replace(output=right.output + 0.01, tolerance=1.0)), parameters)


def test_a_probe_of_its_own_keys() -> None:
    parameters = for_format("torch", kdim=5, vdim=7)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, width)).astype("f4") for n, width in ((3, 12), (4, 5), (4, 7)))
    output = mha.multi_head_attention(q, k, v, attn_drop=0.0, out_drop=0.0, training=False, is_causal=True,
                                      **parameters.options).attn_output  # fmt: skip
    state = TO["torch"](parameters)
    assert same(auto(state, 4, verify=Probe(q, output, k, v, is_causal=True)), parameters)
    with pytest.raises(ValueError, match="does not answer"):
        auto(state, 4, verify=Probe(q, output, k, v))


def test_what_is_wrong_with_the_only_format_is_said() -> None:
    state = TO["llama"](for_format("llama")) | {"k_norm.weight": np.ones(3, "f4")}
    with pytest.raises(ValueError, match=r"not understood \['k_norm.weight'\]"):
        auto(state, 4)
    with pytest.raises(TypeError, match="not a mapping"):
        auto([1], 4)  # type: ignore[arg-type]
