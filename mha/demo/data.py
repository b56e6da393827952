"""The file `digits.npz`: a small trained vision transformer, held-out images, and what PyTorch answered.

It is written by ``python -m mha.demo.train`` and read by everything else in this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

STATE_PREFIX = "state:"


@dataclass(frozen=True, eq=False)
class Recording:
    """A trained network and its answers on images it was not trained on.

    Attributes
    ----------
    state : dict of str to ndarray
        The network's PyTorch `state_dict`, float32.
    num_heads : int
        Heads of every attention layer, the one number that a `state_dict` does not tell.
    trained_on : int
        Number of images the network was trained on.
    images : ndarray of uint8, shape (N, 8, 8)
        Held-out scans, 0 (paper) to 16 (ink).
    labels : ndarray of int64, shape (N,)
        The digits that people wrote.
    logits : ndarray of float32, shape (N, 10)
        PyTorch's scores, computed one image at a time.
    """

    state: dict[str, NDArray[np.float32]]
    num_heads: int
    trained_on: int
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]

    @property
    def predictions(self) -> NDArray[np.int64]:
        """PyTorch's answers, shape (N,)."""
        return self.logits.argmax(axis=1)

    @property
    def accuracy(self) -> float:
        """Share of the held-out images that PyTorch got right."""
        return float((self.predictions == self.labels).mean())

    def arrays(self) -> dict[str, Array]:
        """Everything as named arrays, the way it lies in the file."""
        state = {STATE_PREFIX + name: value for name, value in self.state.items()}
        numbers = {"num_heads": np.int64(self.num_heads), "trained_on": np.int64(self.trained_on)}
        answers = {"predictions": self.predictions, "accuracy": np.float64(self.accuracy)}
        recorded = {"images": self.images, "labels": self.labels, "logits": self.logits}
        return {name: np.asarray(value) for name, value in (state | numbers | recorded | answers).items()}

    def save(self, path: Path) -> None:
        """Write the recording to `path` (npz, compressed)."""
        np.savez_compressed(path, allow_pickle=False, **self.arrays())

    @classmethod
    def load(cls) -> Recording:
        """Read the recording that comes with the package."""
        with files(__package__).joinpath("digits.npz").open("rb") as stream, np.load(stream) as stored:
            arrays = dict(stored)
        state = {name.removeprefix(STATE_PREFIX): arrays[name] for name in arrays if name.startswith(STATE_PREFIX)}
        return cls(
            state=state,
            num_heads=int(arrays["num_heads"]),
            trained_on=int(arrays["trained_on"]),
            images=arrays["images"],
            labels=arrays["labels"],
            logits=arrays["logits"],
        )
