"""What Hugging Face's config.json beside a model decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mha.convert import FROM, TO, load, save
from mha.convert.config import Config, config_beside

from .layers import for_format
from .test_formats import same


def stated(folder: Path, **values: Any) -> Config:
    (folder / "config.json").write_text(json.dumps(values))
    return config_beside(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("values", "heads", "kv_heads"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, 8, 2),
        ({"n_head": 12}, 12, None),
        ({"num_heads": True}, None, None),
        ({"encoder_attention_heads": 6, "decoder_attention_heads": 6}, 6, None),
        ({"encoder_attention_heads": 6, "decoder_attention_heads": 4}, None, None),
        ({"model_type": "falcon", "num_attention_heads": 71, "num_kv_heads": 71, "multi_query": True}, 71, 1),
        ({"model_type": "falcon", "num_attention_heads": 32, "multi_query": False}, 32, 32),
        ({"model_type": "falcon", "num_attention_heads": 64, "num_kv_heads": 8, "new_decoder_architecture": True},
         64, 8),
    ],
)  # fmt: skip
def test_heads(values: dict[str, Any], heads: int | None, kv_heads: int | None, tmp_path: Path) -> None:
    found = stated(tmp_path, **values)
    assert (found.num_heads, found.num_kv_heads) == (heads, kv_heads)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ({"query_pre_attn_scalar": 256}, 1 / 16),
        ({"attention_multiplier": 0.0078125}, 0.0078125),
        ({"scale_attn_weights": False}, 1.0),
        ({"scale_attn_weights": True}, None),
        ({"query_pre_attn_scalar": 0}, None),
        ({"query_pre_attn_scalar": "256"}, None),
        ({"attention_multiplier": float("nan")}, None),
        ({}, None),
    ],
)
def test_scale(values: dict[str, Any], scale: float | None, tmp_path: Path) -> None:
    assert stated(tmp_path, **values).scale == scale


def test_a_folder_without_one_or_with_something_else(tmp_path: Path) -> None:
    assert config_beside(tmp_path) == Config()
    for text in ("[]", "{", '"x"', "[" * 100_000, ""):
        (tmp_path / "config.json").write_text(text)
        assert config_beside(tmp_path) == Config()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("bloom", {"model_type": "bloom", "n_head": 4}),
        ("gpt_neox", {"model_type": "gpt_neox", "num_attention_heads": 4}),
        ("falcon_mqa", {"model_type": "falcon", "num_attention_heads": 4, "multi_query": True}),
        ("falcon", {"model_type": "falcon", "num_attention_heads": 4, "num_kv_heads": 2,
                    "new_decoder_architecture": True}),
        ("gpt_neox", {"model_type": "falcon", "num_attention_heads": 4, "multi_query": False}),
        ("hf_bart", {"model_type": "whisper", "encoder_attention_heads": 4}),
        ("gpt_neo", {"model_type": "gpt_neo", "num_heads": 4}),
    ],
)  # fmt: skip
def test_the_type_of_the_model_decides_between_formats(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    kv_heads = {"falcon_mqa": 1, "falcon": 2}.get(name)
    parameters = for_format(name, kv_heads=kv_heads)
    save(tmp_path / "model.safetensors", TO[name](parameters))
    if name != "falcon_mqa":  # with one key head all of these formats are one
        with pytest.raises(ValueError, match="are those of"):
            load(tmp_path, 4, num_kv_heads=kv_heads)
    stated(tmp_path, **values)
    assert same(load(tmp_path), parameters)


def test_a_scale_that_is_not_the_usual_one(tmp_path: Path) -> None:
    save(tmp_path / "model.npz", TO["llama"](for_format("llama")))
    stated(tmp_path, num_attention_heads=4, query_pre_attn_scalar=16, attn_logit_softcapping=50.0)
    with pytest.warns(UserWarning, match=r"attn_logit_softcapping, .* softcap=50"):
        parameters = load(tmp_path / "model.npz")
    assert parameters.scale == 0.25
    assert (parameters[0] == for_format("llama")[0]).all()
    stated(tmp_path, num_attention_heads=4, query_pre_attn_scalar=3)
    assert same(load(tmp_path / "model.npz"), for_format("llama"))


def test_given_heads_go_before_stated_ones(tmp_path: Path) -> None:
    state = TO["llama"](for_format("llama"))
    save(tmp_path / "model.npz", state)
    stated(tmp_path, num_attention_heads=2, num_key_value_heads=1)
    assert same(load(tmp_path / "model.npz", 4), FROM["llama"](state, 4))
    with pytest.raises(ValueError, match="12 query heads and 5 key heads do not go together"):
        load(tmp_path / "model.npz", np.int64(12), num_kv_heads=5)  # type: ignore[arg-type]
