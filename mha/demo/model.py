"""A vision transformer in plain NumPy whose attention is handed in from outside.

The network is the one that `mha.demo.train` trains with PyTorch: 2 x 2 patches of an 8 x 8 image, a class token,
learned positions, pre-norm encoder blocks with ReLU, a final layer norm, and a linear layer that reads the class token
(Dosovitskiy et al., 2021, "An Image is Worth 16x16 Words").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PATCH = 2
State = Mapping[str, NDArray[np.float32]]


class Attention(Protocol):
    """What the network asks of an attention layer: `mha.MultiHeadAttention` has it, and so has `PlainAttention`."""

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        need_weights: bool = False,
        average_attn_weights: bool = False,
    ) -> tuple[Array, Array | None]: ...


class FromTorch(Protocol):
    """A maker of attention layers: takes a PyTorch `state_dict`, the number of heads, and the layer's prefix in it."""

    def __call__(self, state_dict: State, num_heads: int, prefix: str = "") -> Attention: ...


class Answer(NamedTuple):
    """Scores of shape (N, 10), and per layer the attention weights (N, H, T, T), or none if they were not asked for."""

    logits: NDArray[np.float32]
    weights: list[NDArray[np.float32]]


def split_patches(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Cut images (N, 8, 8) with values 0 to 16 into flat patches (N, 16, 4) with values -1 to 1."""
    count, height, width = images.shape
    blocks = images.reshape(count, height // PATCH, PATCH, width // PATCH, PATCH).swapaxes(2, 3)
    return blocks.reshape(count, -1, PATCH * PATCH).astype(np.float32) / np.float32(8) - np.float32(1)


def linear(x: Array, state: State, name: str) -> Array:
    """PyTorch's `nn.Linear` called `name`."""
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(x: Array, state: State, name: str, epsilon: float = 1e-5) -> Array:
    """PyTorch's `nn.LayerNorm` called `name`, over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(epsilon))
    return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


class PlainAttention:
    """Multi-head self-attention as one writes it in NumPy: every intermediate result is an array.

    It is what the package's fused layer is compared with.
    """

    def __init__(self, state_dict: State, num_heads: int, prefix: str = "") -> None:
        self.num_heads = num_heads
        self.weight_in = np.ascontiguousarray(state_dict[f"{prefix}in_proj_weight"].T)
        self.bias_in = state_dict[f"{prefix}in_proj_bias"]
        self.weight_out = np.ascontiguousarray(state_dict[f"{prefix}out_proj.weight"].T)
        self.bias_out = state_dict[f"{prefix}out_proj.bias"]

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        need_weights: bool = False,
        average_attn_weights: bool = False,
    ) -> tuple[Array, Array | None]:
        """Attend: (N, L, E) to (N, L, E), and the weights (N, H, L, L), or (N, L, L) if averaged, or None.

        Raises
        ------
        ValueError
            If `query`, `key` and `value` are not one and the same array.
        """
        if not (query is key is value):
            raise ValueError("query, key and value differ. This is self-attention: pass the same array three times.")
        batch, length, width = query.shape
        projected = query @ self.weight_in + self.bias_in
        heads = projected.reshape(batch, length, 3, self.num_heads, -1).transpose(2, 0, 3, 1, 4)
        q, k, v = heads
        scores = q @ k.swapaxes(-1, -2) / np.float32(np.sqrt(q.shape[-1]))
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = scores / scores.sum(axis=-1, keepdims=True)
        joined = (weights @ v).swapaxes(1, 2).reshape(batch, length, width)
        output = joined @ self.weight_out + self.bias_out
        if not need_weights:
            return output, None
        return output, weights.mean(axis=1) if average_attn_weights else weights


class DigitTransformer:
    """The trained network, forward only.

    Parameters
    ----------
    state : mapping of str to ndarray
        PyTorch's `state_dict` of the whole network.
    num_heads : int
        Heads of every attention layer.
    attention : callable
        Makes one attention layer from `state`, `num_heads` and the layer's prefix.
    """

    def __init__(self, state: State, num_heads: int, attention: FromTorch) -> None:
        self.state = state
        depth = sum(name.endswith("in_proj_weight") for name in state)
        self.blocks = [f"encoder.layers.{index}" for index in range(depth)]
        self.attention = [attention(state, num_heads, prefix=f"{block}.self_attn.") for block in self.blocks]

    def tokens(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed images (N, 8, 8) as tokens (N, 17, E): the class token first, then the patches row by row."""
        patches = linear(split_patches(images), self.state, "embedding")
        class_token = np.broadcast_to(self.state["class_token"], (len(images), 1, patches.shape[-1]))
        return np.concatenate([class_token, patches], axis=1) + self.state["positions"]

    def __call__(self, images: NDArray[np.uint8], need_weights: bool = False) -> Answer:
        """Score images (N, 8, 8) for the ten digits; `need_weights` asks for what every head looked at."""
        x, seen = self.tokens(images), []
        for block, attention in zip(self.blocks, self.attention, strict=True):
            normed = layer_norm(x, self.state, f"{block}.norm1")
            attended, weights = attention(normed, normed, normed, need_weights=need_weights, average_attn_weights=False)
            if weights is not None:
                seen.append(weights.reshape(len(x), -1, *weights.shape[-2:]))
            x = x + attended
            hidden = linear(layer_norm(x, self.state, f"{block}.norm2"), self.state, f"{block}.linear1")
            x = x + linear(np.maximum(hidden, 0), self.state, f"{block}.linear2")
        x = layer_norm(x[:, 0], self.state, "encoder.norm")
        return Answer(linear(x, self.state, "head"), seen)
