"""Train the demo's network with PyTorch and record its answers: ``python -m mha.demo.train [--check]``.

Needs PyTorch and scikit-learn, which the demo itself does not. With `--check` nothing is written: the network is
trained again and compared with the recording that comes with the package.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mha.demo.data import Recording
from mha.demo.model import split_patches

if TYPE_CHECKING:
    import torch

WIDTH, HEADS, LAYERS, TOKENS, DIGITS = 48, 3, 2, 17, 10
EPOCHS, BATCH, LEARNING_RATE, SEED = 40, 64, 5e-3, 0
HELD_OUT = 360


def build() -> torch.nn.ModuleDict:
    """Make the untrained network; its `state_dict` is what `mha.demo.model.DigitTransformer` reads."""
    import torch

    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
    norm = torch.nn.LayerNorm(WIDTH)
    network = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Linear(4, WIDTH),
            "encoder": torch.nn.TransformerEncoder(layer, LAYERS, norm, enable_nested_tensor=False),
            "head": torch.nn.Linear(WIDTH, DIGITS),
        }
    )
    for block in network["encoder"].layers:  # its layers start as copies of one another
        for weight in block.parameters():
            if weight.dim() == 2:
                torch.nn.init.xavier_uniform_(weight)
    network.register_parameter("class_token", torch.nn.Parameter(0.5 * torch.randn(1, 1, WIDTH)))
    network.register_parameter("positions", torch.nn.Parameter(0.5 * torch.randn(1, TOKENS, WIDTH)))
    return network


def forward(network: torch.nn.ModuleDict, patches: torch.Tensor) -> torch.Tensor:
    """Score patches (N, 16, 4) for the ten digits, (N, 10)."""
    import torch

    tokens = network["embedding"](patches)
    tokens = torch.cat([network.class_token.expand(len(tokens), -1, -1), tokens], dim=1) + network.positions
    return network["head"](network["encoder"](tokens)[:, 0])


def fit(network: torch.nn.ModuleDict, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    """Train in place: AdamW, one cycle of the learning rate, dropout and label smoothing."""
    import torch

    patches, targets = torch.from_numpy(split_patches(images)), torch.from_numpy(labels)
    steps = EPOCHS * -(-len(targets) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    network.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(targets)).split(BATCH):
            loss = torch.nn.functional.cross_entropy(
                forward(network, patches[batch]), targets[batch], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def record() -> Recording:
    """Train the network from the fixed seed, in one thread, and record its answers on the held-out images."""
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.int64)
    split = train_test_split(images, labels, test_size=HELD_OUT, random_state=SEED, stratify=labels)
    train_images, held_images, train_labels, held_labels = split
    network = build()
    fit(network, train_images, train_labels)
    network.eval()
    with torch.inference_mode():
        logits = [forward(network, patches[None]) for patches in torch.from_numpy(split_patches(held_images))]
    return Recording(
        state={name: value.numpy() for name, value in network.state_dict().items()},
        num_heads=HEADS,
        trained_on=len(train_labels),
        images=held_images,
        labels=held_labels,
        logits=torch.cat(logits).numpy(),
    )


def check(fresh: Recording, stored: Recording) -> str:
    """Say in one line whether the fresh training reproduces the stored one."""
    ours, theirs = fresh.arrays(), stored.arrays()
    if ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours):
        return "reproduced: every stored array is equal to the last bit"
    if not (np.array_equal(fresh.images, stored.images) and np.array_equal(fresh.labels, stored.labels)):
        return "NOT reproduced: the held-out images differ"
    same = int((fresh.predictions == stored.predictions).sum())
    return f"NOT reproduced to the last bit: {same} of {len(stored.labels)} predictions are the same as the stored ones"


def main(argv: Sequence[str] | None = None) -> int:
    """Train and write, or train and compare; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mha.demo.train", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("--check", action="store_true", help="write nothing, compare with the stored recording")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        fresh = record()
    except ImportError as error:
        print(f"Training needs PyTorch and scikit-learn: {error}. Try: pip install torch scikit-learn", file=sys.stderr)
        return 2
    print(f"trained in {time.perf_counter() - start:.1f} s, held-out accuracy {fresh.accuracy:.2%}")
    if options.check:
        verdict = check(fresh, Recording.load())
        print(verdict)
        return int(verdict.startswith("NOT"))
    path = Path(__file__).with_name("digits.npz")
    fresh.save(path)
    print(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
