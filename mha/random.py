"""Dropout randomness: a global seed, states drawn from it, and the masks that a state stands for.

A mask is a pure function of a (seed, offset) pair and of the global indices of an element, so every backend, thread
count and shard sees the same one and nothing of its size is ever stored. The generator is Philox4x32-10 (Salmon,
Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import operator
import secrets
import threading
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha.optional import graph_is_captured

Flags = NDArray[np.bool_]

_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW_WORD = 0xFFFFFFFF
_LOW = np.uint64(_LOW_WORD)
_SHIFT = np.uint64(32)

#: One Philox call gives 128 bits: 16 for each of 8 neighbouring elements.
_PER_CALL = 8


class DropoutState(NamedTuple):
    """What a dropout mask depends on: a 64-bit seed and a 32-bit offset, one offset per mask."""

    seed: int
    offset: int


class _Source:
    """The global seed and how many offsets were handed out; draws are atomic."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.restart(secrets.randbits(64))

    def restart(self, seed: int) -> None:
        with self._lock:
            self._seed, self._offset = seed, 0

    def draw(self, count: int) -> DropoutState:
        with self._lock:
            state = DropoutState(self._seed, self._offset)
            self._offset = (self._offset + count) & _LOW_WORD
        return state


_source = _Source()


def seed(n: int) -> None:
    """Restart the global sequence of dropout states; a process that never calls this starts at random.

    Parameters
    ----------
    n : int
        Seed, reduced modulo 2 ** 64.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    """
    try:
        number = operator.index(n)
    except TypeError:
        raise TypeError(f"seed is a {type(n).__name__}. Pass an integer, for example mha.seed(0).") from None
    _source.restart(number & 0xFFFFFFFFFFFFFFFF)


def next_state(count: int = 1) -> DropoutState:
    """Draw the next state and reserve `count` offsets from it on; safe to call from several threads.

    Raises
    ------
    ValueError
        If `count` is less than 1.
    RuntimeError
        While CuPy captures a CUDA graph: every replay would repeat the mask of this state.
    """
    if count < 1:
        raise ValueError(f"count is {count}. Reserve one offset for each dropout mask, at least 1.")
    if graph_is_captured():
        raise RuntimeError(
            "a CUDA graph is being captured, and every replay would repeat this dropout mask. Draw the state before "
            "the capture and pass it as dropout_state if that is wanted."
        )
    return _source.draw(count)


def next_generator() -> np.random.Generator:
    """A generator of initial parameters, from the next state."""
    state = next_state()
    return np.random.default_rng([state.seed & 0xFFFFFFFF, state.seed >> 32, state.offset])


def xavier_uniform(rng: np.random.Generator, *shape: int) -> NDArray[np.float64]:
    """Uniform within sqrt(6 / (fan_in + fan_out)), the last two axes being the fans (Glorot and Bengio, 2010)."""
    bound = (6 / (shape[-2] + shape[-1])) ** 0.5
    return rng.uniform(-bound, bound, shape)


def threshold(p: float) -> int:
    """The 16-bit draws below this number are dropped: ``round(p * 65536)``.

    Raises
    ------
    ValueError
        If `p` is not between 0 and 1.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability is {p}. It must lie between 0 and 1.")
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """The factor of kept elements, ``1 / (1 - p)``; 0 for ``p = 1``, which keeps none."""
    return 1.0 / (1.0 - float(p)) if p < 1.0 else 0.0


def philox4x32(
    c0: Any, c1: Any, c2: Any, c3: Any, key: tuple[int, int], xp: ModuleType = np
) -> tuple[NDArray[Any], ...]:
    """Philox4x32-10 of the 128-bit counters (c0, c1, c2, c3), which broadcast.

    Parameters
    ----------
    c0, c1, c2, c3 : int or array
        Words of the counters, each below 2 ** 32.
    key : (int, int)
        Low and high word of the key.

    Returns
    -------
    tuple of 4 arrays, uint32
    """
    # 32 x 32 bit products need 64 bits; unsigned 64-bit scalars keep 0-d counters unsigned in every NumPy.
    c0, c1, c2, c3 = (xp.asarray(c).astype(np.uint64) for c in (c0, c1, c2, c3))
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW_WORD, (k1 + _KEY_STEPS[1]) & _LOW_WORD
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))


def _keep(state: tuple[int, int], p: float, first: int, count: int, rows: Any, samples: Any, xp: ModuleType) -> Flags:
    """Keep flags of the elements `first` to ``first + count`` of every row; rows and samples broadcast to (..., 1)."""
    state_seed, offset = state
    groups = xp.arange(first // _PER_CALL, -(-(first + count) // _PER_CALL))
    key = state_seed & _LOW_WORD, state_seed >> 32 & _LOW_WORD
    words = xp.stack(philox4x32(groups, rows, samples, offset & _LOW_WORD, key, xp), axis=-1)
    halves = xp.stack([words & 0xFFFF, words >> 16], axis=-1)
    draws = halves.reshape(*words.shape[:-2], len(groups) * _PER_CALL)
    skip = first % _PER_CALL
    keep: Flags = draws[..., skip : skip + count] >= threshold(p)
    return keep


def attention_keep(
    state: tuple[int, int],
    p: float,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    *,
    batch_start: int = 0,
    head_start: int = 0,
    query_start: int = 0,
    key_start: int = 0,
    total_heads: int | None = None,
    xp: ModuleType = np,
) -> Flags:
    """Which attention weights survive dropout.

    Parameters
    ----------
    state : DropoutState or (int, int)
    p : float
        Probability of dropping, in steps of 1 / 65536.
    batch, heads, queries, keys : int
        Size of the mask; appended keys count as keys.
    batch_start, head_start, query_start, key_start : int
        Global indices of the first element, for a shard of a larger mask.
    total_heads : int, optional
        Heads of the whole layer; None means `heads`.
    xp : module
        NumPy or CuPy, the owner of the result.

    Returns
    -------
    bool array, (batch, heads, queries, keys), True = keep
        Key j of query i, head h, sample n takes half ``j & 1`` of word ``(j & 7) >> 1`` of Philox at the counter
        ``(j >> 3, i, n * total_heads + h, offset)`` under the key `seed`, and stays iff it is at least `threshold(p)`.

    Raises
    ------
    ValueError
        If the shard's heads reach beyond `total_heads`, or `p` is not a probability.
    """
    total = heads if total_heads is None else total_heads
    if head_start + heads > total:
        raise ValueError(
            f"heads {head_start} to {head_start + heads} are not among total_heads={total}. "
            "Pass the number of heads of the whole layer."
        )
    samples = xp.arange(batch_start, batch_start + batch).reshape(batch, 1, 1, 1) * total
    samples = (samples + xp.arange(head_start, head_start + heads).reshape(heads, 1, 1)) & _LOW_WORD
    rows = xp.arange(query_start, query_start + queries).reshape(queries, 1)
    return _keep(state, p, key_start, keys, rows, samples, xp)


def output_keep(
    state: tuple[int, int],
    p: float,
    batch: int,
    length: int,
    features: int,
    *,
    batch_start: int = 0,
    query_start: int = 0,
    feature_start: int = 0,
    xp: ModuleType = np,
) -> Flags:
    """Which elements of a layer's output survive dropout.

    The counter of feature e of row l of sample n is ``(e >> 3, l, n, offset)``, with this state's own offset: a layer
    that also drops attention weights at offset o passes o + 1. Bits, threshold and `*_start` as in `attention_keep`.

    Returns
    -------
    bool array, (batch, length, features), True = keep
    """
    samples = xp.arange(batch_start, batch_start + batch).reshape(batch, 1, 1)
    rows = xp.arange(query_start, query_start + length).reshape(length, 1)
    return _keep(state, p, feature_start, features, rows, samples, xp)
