"""The demo: a trained network answers on NumPy arrays as it did in PyTorch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from mha import optional
from mha.__main__ import main
from mha.demo.data import Recording
from mha.demo.model import DigitTransformer, PlainAttention
from mha.demo.picture import as_text, look
from mha.demo.run import frozen_layer


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording.load()


def test_the_recording_is_small_and_honest(recording: Recording) -> None:
    assert len(files("mha.demo").joinpath("digits.npz").read_bytes()) < 300_000
    assert recording.accuracy >= 0.95
    assert len(recording.images) == len(recording.labels) >= 300


@pytest.mark.parametrize("attention", [frozen_layer, PlainAttention])
def test_scores_equal_pytorchs_one_by_one(recording: Recording, attention: object) -> None:
    network = DigitTransformer(recording.state, recording.num_heads, attention)  # type: ignore[arg-type]
    logits = network(recording.images).logits
    np.testing.assert_allclose(logits, recording.logits, atol=2e-5)
    assert (logits.argmax(1) == recording.predictions).all()


def test_weights_equal_the_plain_ones(recording: Recording) -> None:
    ours, plain = (
        DigitTransformer(recording.state, recording.num_heads, attention)(recording.images[:20], need_weights=True)
        for attention in (frozen_layer, PlainAttention)
    )
    for one, other in zip(ours.weights, plain.weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_broken_layer_is_noticed(recording: Recording) -> None:
    def broken(*arguments: object, **keywords: object) -> object:
        layer = frozen_layer(*arguments, **keywords).train().eval()  # type: ignore[arg-type]
        layer.io_weight_bias[: layer.io_weight_bias.size // 2] *= -0.5
        return layer

    network = DigitTransformer(recording.state, recording.num_heads, broken)  # type: ignore[arg-type]
    assert (network(recording.images).logits.argmax(1) != recording.predictions).any()


@pytest.mark.parametrize("with_matplotlib", [True, False])
def test_the_command_prints_the_facts(
    with_matplotlib: bool,
    recording: Recording,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not with_matplotlib:
        monkeypatch.setattr(optional, "matplotlib_pyplot", lambda: None)
    elif optional.matplotlib_pyplot() is None:
        pytest.skip("matplotlib is not installed: no picture to draw")
    picture = tmp_path / "attention.png"
    assert main(["demo", "--picture", str(picture), "--rounds", "2"]) == 0
    printed = capsys.readouterr().out
    assert f"same predictions    {len(recording.images)} of {len(recording.images)}" in printed
    assert f"{recording.accuracy:.2%} here, {recording.accuracy:.2%} in PyTorch" in printed
    assert picture.exists() == with_matplotlib
    assert ("what the attention looked at" in printed) != with_matplotlib


def test_text_shows_scan_and_attention(recording: Recording) -> None:
    network = DigitTransformer(recording.state, recording.num_heads, frozen_layer)
    lines = as_text(look(network, recording.images, recording.labels)).splitlines()
    assert len(lines) == 2 + 8 + 1 + 8
    assert any("@" in line for line in lines[1:9])
