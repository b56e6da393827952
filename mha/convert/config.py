"""What Hugging Face's ``config.json`` beside a model says of its attention layers."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mha.convert.parameters import PackedParameters

_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
#: Of a model of two parts; they count if they agree.
_OF_PARTS = ("encoder_attention_heads", "decoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_MOST_BYTES = 2**20


@dataclass(frozen=True)
class Config:
    """What is stated; None where it is not."""

    num_heads: int | None = None
    num_kv_heads: int | None = None
    model_type: str | None = None
    scale: float | None = None
    softcap: float | None = None

    def heads(self, num_heads: int | None, num_kv_heads: int | None) -> tuple[int | None, int | None]:
        """Query and key heads: what is given; else what is stated, of the key heads only if the query heads are too."""
        if num_heads is not None:
            return num_heads, num_kv_heads
        return self.num_heads, self.num_kv_heads if num_kv_heads is None else num_kv_heads

    def applied(self, parameters: PackedParameters) -> PackedParameters:
        """With the stated scale; what parameters cannot hold is a warning."""
        if self.softcap is not None:
            warnings.warn(
                f"config.json states attn_logit_softcapping, which is no weight: call the layer with "
                f"softcap={self.softcap:g}.",
                stacklevel=3,
            )
        if self.scale is None or parameters.scale is not None:
            return parameters
        return parameters._replace(scale=None if self.scale == parameters.layout.scale else self.scale)


def config_beside(path: str | os.PathLike[str]) -> Config:
    """Of the ``config.json`` beside a file or in a folder; nothing is stated where there is none that can be read."""
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        stated = json.loads(file.read_bytes()) if file.stat().st_size < _MOST_BYTES else None
    except (OSError, ValueError, RecursionError):
        stated = None
    return _read(stated) if isinstance(stated, dict) else Config()


def _read(stated: dict[str, Any]) -> Config:
    heads, kv_heads = (
        next((stated[name] for name in names if type(stated.get(name)) is int), None) for names in (_HEADS, _KV_HEADS)
    )
    parts = {stated.get(name) for name in _OF_PARTS if type(stated.get(name)) is int}
    if heads is None and len(parts) == 1:
        heads = parts.pop()
    model_type = stated.get("model_type")
    if model_type == "falcon" and not stated.get("new_decoder_architecture"):
        # Its configuration states the query heads as key heads.
        kv_heads = 1 if stated.get("multi_query", True) else heads
        model_type = "falcon_mqa" if kv_heads == 1 else "falcon_rw"
    model_type = model_type if isinstance(model_type, str) else None
    return Config(heads, kv_heads, model_type, _scale(stated), _positive(stated.get("attn_logit_softcapping")))


def _scale(stated: dict[str, Any]) -> float | None:
    """The factor on the scores where it is not that of the width of a head: Gemma, Granite, GPT-2."""
    width = _positive(stated.get("query_pre_attn_scalar"))
    if width is not None:
        return width**-0.5
    return 1.0 if stated.get("scale_attn_weights") is False else _positive(stated.get("attention_multiplier"))


def _positive(x: Any) -> float | None:
    return float(x) if type(x) in (int, float) and 0 < x < math.inf else None
