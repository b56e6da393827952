"""``python -m mha demo``: classify the held-out scans and compare with what PyTorch answered."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path

from mha import convert, optional
from mha.demo import text
from mha.demo.data import STATE_PREFIX, Recording
from mha.demo.model import DigitTransformer, PlainAttention, State
from mha.demo.picture import as_text, draw, look
from mha.module import MultiHeadAttention


def frozen_layer(state_dict: State, num_heads: int, prefix: str = "") -> MultiHeadAttention:
    """One attention layer of the trained network, its weights read from the file into a packed vector."""
    with as_file(files(__package__).joinpath("digits.npz")) as path:
        parameters = convert.load(path, num_heads, STATE_PREFIX + prefix)
    return MultiHeadAttention.from_parameters(parameters).freeze()


#: There is no `--text`; None is one without a folder.
_NO_TEXT = Path()


def interleaved_best(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The shortest time of each call in milliseconds, taken in turn so that the machine's moods hit all alike."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit status, 0 if every prediction equals PyTorch's."""
    parser = argparse.ArgumentParser(prog="python -m mha demo", description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path("attention.png"), help="where to draw (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of the timing (%(default)s)")
    parser.add_argument("--text", type=Path, nargs="?", const=None, default=_NO_TEXT, metavar="FOLDER",
                        help="all-MiniLM-L6-v2 instead, as installed or in a folder")  # fmt: skip
    options = parser.parse_args(argv)
    if options.text is not _NO_TEXT:
        return text.main(options.text)

    recording = Recording.load()
    images, labels = recording.images, recording.labels
    network = DigitTransformer(recording.state, recording.num_heads, frozen_layer)
    plain = DigitTransformer(recording.state, recording.num_heads, PlainAttention)
    vectors = ", ".join(str(x.io_weight_bias.size) for x in network.attention)  # type: ignore[attr-defined]
    print(f"a vision transformer, trained with PyTorch on {recording.trained_on} handwritten digits (scikit-learn)")
    print(f"{len(network.attention)} attention layers, {recording.num_heads} heads; packed vectors of {vectors} values")

    predictions = network(images).logits.argmax(axis=1)
    same = int((predictions == recording.predictions).sum())
    print(f"held-out scans      {len(images)}")
    print(f"accuracy            {(predictions == labels).mean():.2%} here, {recording.accuracy:.2%} in PyTorch")
    print(f"same predictions    {same} of {len(images)}")

    tokens = network.tokens(images)
    attentions = [partial(a, tokens, tokens, tokens) for a in (network.attention[0], plain.attention[0])]
    ours, unfused = interleaved_best(attentions, options.rounds)
    print(
        f"one attention layer {ours:.2f} ms here, {unfused:.2f} ms unfused in NumPy: {unfused / ours:.1f} times faster"
    )

    gaze = look(network, images, labels)
    pyplot = optional.matplotlib_pyplot()
    if pyplot is None:
        print(f"\n{as_text(gaze)}\n\nmatplotlib is not installed, so the picture is text.")
    else:
        draw(gaze, options.picture, pyplot)
        print(f"what it looked at   {options.picture}")
    return 0 if same == len(images) else 1
