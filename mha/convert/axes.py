"""How formats lay out what a projection is: which axis is which, and in what order query, key and value share one.

Here a weight is (in-features, out-features) and a bias (out-features,); everything is a view where strides allow it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from mha.optional import array_module

Array = NDArray[Any]


class Heads(NamedTuple):
    """Of query and of key and value."""

    query: int
    key: int

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.query // self.key


@dataclass(frozen=True)
class Axes:
    """One way to lay out a tensor: `ndim` axes, to and from the plain one; `says_heads` finds their number in a shape.

    `axes` is what error messages call them.
    """

    axes: str
    ndim: int
    plain: Callable[[Array], Array]
    laid_out: Callable[[Array, int], Array]
    says_heads: Callable[[tuple[int, ...]], int] | None = None
    #: Whether the first axis counts query, key and value.
    of_three: bool = False

    def fit(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can lie so."""
        return len(shape) == self.ndim and (not self.of_three or shape[0] == 3)


def _by_heads(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:-1], heads, -1)


#: Of a weight.
OUT_IN = Axes("(out, in)", 2, lambda x: x.T, lambda x, heads: x.T)
IN_OUT = Axes("(in, out)", 2, lambda x: x, lambda x, heads: x)
IN_HEADS = Axes("(in, heads, width)", 3, lambda x: x.reshape(x.shape[0], -1), _by_heads, lambda shape: shape[1])
HEADS_OUT = Axes("(heads, width, out)", 3, lambda x: x.reshape(-1, x.shape[-1]),
                 lambda x, heads: x.reshape(heads, -1, x.shape[-1]), lambda shape: shape[0])  # fmt: skip
THREE_HEADS_IN = Axes("(3, heads, width, in)", 4, lambda x: x.reshape(-1, x.shape[-1]).T,
                      lambda x, heads: x.T.reshape(3, heads, -1, x.shape[0]), lambda shape: shape[1], True)  # fmt: skip
#: Of a bias.
OUT = Axes("(out,)", 1, lambda x: x, lambda x, heads: x)
HEADS = Axes("(heads, width)", 2, lambda x: x.reshape(-1), _by_heads, lambda shape: shape[0])
THREE_HEADS = Axes("(3, heads, width)", 3, lambda x: x.reshape(-1), lambda x, heads: x.reshape(3, heads, -1),
                   lambda shape: shape[1], True)  # fmt: skip


@dataclass(frozen=True)
class Order:
    """How query, key and value share the last axis of a fused tensor. `grouped`: with fewer key heads too."""

    words: str
    split: Callable[[Array, Heads], list[Array]]
    join: Callable[[list[Array], Heads], Array]
    grouped: bool


def _split_blocks(x: Array, heads: Heads) -> list[Array]:
    width = x.shape[-1] // (heads.query + 2 * heads.key)
    bounds = [0, heads.query * width, (heads.query + heads.key) * width, x.shape[-1]]
    return [x[..., bounds[i] : bounds[i + 1]] for i in range(3)]


def _join_blocks(parts: list[Array], heads: Heads) -> Array:
    joined: Array = array_module(*parts).concatenate(parts, axis=-1)
    return joined


def _split_groups(x: Array, heads: Heads) -> list[Array]:
    x = x.reshape(*x.shape[:-1], heads.key, heads.group + 2, -1)
    parts = x[..., : heads.group, :], x[..., heads.group : -1, :], x[..., -1:, :]
    return [part.reshape(*part.shape[:-3], -1) for part in parts]


def _join_groups(parts: list[Array], heads: Heads) -> Array:
    counts = heads.group, 1, 1
    shaped = [x.reshape(*x.shape[:-1], heads.key, n, -1) for x, n in zip(parts, counts, strict=True)]
    joined: Array = array_module(*parts).concatenate(shaped, axis=-2)
    return joined.reshape(*joined.shape[:-3], -1)


def _split_last(x: Array, heads: Heads) -> list[Array]:
    x = x.reshape(*x.shape[:-1], heads.query, -1, 3)
    return [x[..., i].reshape(*x.shape[:-3], -1) for i in range(3)]


def _join_last(parts: list[Array], heads: Heads) -> Array:
    joined: Array = array_module(*parts).stack(parts, axis=-1)
    return joined.reshape(*joined.shape[:-2], -1)


BLOCKS = Order("all of the query, all of the key, all of the value", _split_blocks, _join_blocks, True)
GROUPS = Order("key head by key head: its query heads, its key, its value", _split_groups, _join_groups, True)
#: With as many key heads as query heads that is GROUPS.
HEAD_BY_HEAD = Order("head by head: query, key, value", _split_groups, _join_groups, False)
FEATURE_BY_FEATURE = Order("feature by feature: query, key, value", _split_last, _join_last, False)
