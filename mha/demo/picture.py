"""What the attention looked at: the patches that the class token read, as a PNG or, without matplotlib, as text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha.demo.model import PATCH, DigitTransformer

Array = NDArray[Any]

SHADES = " .:-=+*#%@"
INK = "#1f2430"
ROLLOUT = "all layers\n(rollout)"


class Gaze(NamedTuple):
    """Where the network looked, for N images of which it says `predictions`.

    Attributes
    ----------
    images : ndarray of uint8, shape (N, 8, 8)
        The images.
    labels, predictions : ndarray of int64, shape (N,)
        The digits that were written, and the digits that the network read.
    maps : dict of str to ndarray
        Shares of the class token's attention per patch, (N, 4, 4), each summing to 1, by title.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    maps: dict[str, Array]


def patch_shares(from_class_token: Array) -> Array:
    """Drop what the class token gave itself: rows (N, 17) of attention to shares (N, 4, 4) that sum to 1."""
    patches = from_class_token[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    return (patches / patches.sum(axis=1, keepdims=True)).reshape(-1, side, side)


def rollout(weights: Iterable[Array]) -> Array:
    """Attention through all layers (Abnar & Zuidema, 2020): per-layer weights (N, H, T, T) to (N, T, T).

    Each layer passes on half of what it is given (the residual path) and half of what its heads look at, on average.
    """
    through: Any = 1.0
    for layer in weights:
        mean = layer.mean(axis=1)
        step = (mean + np.eye(mean.shape[-1], dtype=mean.dtype)) / 2
        through = step @ through if np.ndim(through) else step
    return through


def look(network: DigitTransformer, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Gaze:
    """Show the network one image of each digit and keep what its attention looked at."""
    chosen = np.unique(labels, return_index=True)[1]
    answer = network(images[chosen], need_weights=True)
    heads = answer.weights[-1][:, :, 0].swapaxes(0, 1)
    maps = {f"last layer,\nhead {number}": patch_shares(rows) for number, rows in enumerate(heads, start=1)}
    maps[ROLLOUT] = patch_shares(rollout(answer.weights)[:, 0])
    return Gaze(images[chosen], labels[chosen], answer.logits.argmax(axis=1), maps)


def above_even(shares: Array) -> Array:
    """Rescale shares (N, 4, 4) for the eye: 0 is an even share of the attention or less, 1 is the picture's maximum."""
    excess = np.maximum(shares - 1 / shares[0].size, 0)
    return excess / excess.max(axis=(1, 2), keepdims=True)


def as_text(gaze: Gaze, count: int = 5) -> str:
    """Draw the first `count` images, and the rollout below them, in characters: the more ink, the more attention."""
    attention = above_even(gaze.maps[ROLLOUT][:count]).repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    written = text_rows(gaze.images[:count] / 16)
    return "\n".join(["what was written", *written, "", "what the attention looked at", *text_rows(attention)])


def text_rows(pictures: Array) -> list[str]:
    """Lines of text for pictures (N, 8, 8) with values 0 to 1, side by side; a pixel is two characters wide."""
    levels = np.rint(pictures * (len(SHADES) - 1)).astype(int).swapaxes(0, 1)
    return [("   ".join("".join(SHADES[level] * 2 for level in row) for row in line)).rstrip() for line in levels]


def draw(gaze: Gaze, path: Path, pyplot: Any) -> None:
    """Draw every image with every map below it and save the figure at `path`.

    Parameters
    ----------
    gaze : Gaze
        What to draw.
    path : Path
        Where to save; the ending says the format.
    pyplot : module
        `matplotlib.pyplot`.
    """
    titles = ["scan", *gaze.maps]
    size = (0.95 * len(gaze.images) + 2.2, 0.95 * len(titles) + 1.2)
    figure, axes = pyplot.subplots(len(titles), len(gaze.images), figsize=size, squeeze=False, layout="constrained")
    attention = [above_even(shares) for shares in gaze.maps.values()]
    for (row, column), panel in np.ndenumerate(axes):
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_color("#d5d8df")
        ink = gaze.images[column] / 16
        placed = {"extent": (0, 8, 8, 0), "vmin": 0, "vmax": 1}
        if row == 0:
            panel.imshow(ink, cmap="Greys", **placed)
            continue
        shown = panel.imshow(attention[row - 1][column], cmap="YlOrRd", **placed)
        panel.imshow(np.ones_like(ink), cmap="Greys", alpha=0.5 * ink, **placed)
    for panel, title in zip(axes[:, 0], titles, strict=True):
        panel.set_ylabel(title, rotation=0, ha="right", va="center", labelpad=8, color=INK)
    for panel, read, label in zip(axes[0], gaze.predictions, gaze.labels, strict=True):
        panel.set_title(f"reads {read}", fontsize=10, color=INK if read == label else "#c0392b")
    bar = figure.colorbar(shown, ax=axes[1:], shrink=0.8, aspect=30, ticks=[0, 1])
    bar.ax.set_yticklabels(["even share\nor less", "most"], color=INK)
    bar.outline.set_visible(False)
    figure.suptitle("What the attention looked at to read a handwritten digit", fontsize=13, color=INK)
    figure.savefig(path, dpi=150, facecolor="white")
    pyplot.close(figure)
