"""Philox against its published vectors; dropout masks as functions of the state and of global indices alone."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from mha import random
from mha.random import DropoutState, attention_keep, output_keep, philox4x32

ONES = 0xFFFFFFFF
STATE = DropoutState(0x0123456789ABCDEF, 7)

# Known answers of Philox4x32-10 from the authors' Random123 library.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def scalar_keep(seed: int, offset: int, p: float, element: int, row: int, sample: int) -> bool:
    """The rule for one element, written out."""
    words = philox4x32(element >> 3, row, sample, offset, (seed & ONES, seed >> 32))
    half = int(words[(element & 7) >> 1]) >> 16 * (element & 1) & 0xFFFF
    return half >= round(p * 65536)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_known_answers(counter, key, answer):
    assert tuple(int(word) for word in philox4x32(*counter, key)) == answer


def test_philox_is_elementwise():
    counters = np.random.default_rng(0).integers(0, 2**32, (4, 3, 5))
    words = philox4x32(*counters, (3, ONES))
    assert all(w.dtype == np.uint32 and w.shape == (3, 5) for w in words)
    assert [int(w[1, 2]) for w in words] == [int(w) for w in philox4x32(*counters[:, 1, 2], (3, ONES))]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_attention_keep_follows_the_rule(p):
    keep = attention_keep(STATE, p, 2, 3, 4, 19)
    expected = [
        [[[scalar_keep(*STATE, p, j, i, n * 3 + h) for j in range(19)] for i in range(4)] for h in range(3)]
        for n in range(2)
    ]
    assert keep.dtype == bool
    np.testing.assert_array_equal(keep, expected)


def test_output_keep_follows_the_rule():
    expected = [[[scalar_keep(*STATE, 0.3, e, i, n) for e in range(10)] for i in range(3)] for n in range(2)]
    np.testing.assert_array_equal(output_keep(STATE, 0.3, 2, 3, 10), expected)


@pytest.mark.parametrize("key_start", [0, 1, 7, 8, 13])
@pytest.mark.parametrize("keys", [0, 1, 9])
def test_attention_shard_is_a_slice(key_start, keys):
    whole = attention_keep(STATE, 0.4, 3, 4, 5, 24)
    shard = attention_keep(
        STATE, 0.4, 2, 2, 3, keys, batch_start=1, head_start=2, query_start=1, key_start=key_start, total_heads=4
    )
    np.testing.assert_array_equal(shard, whole[1:3, 2:4, 1:4, key_start : key_start + keys])


def test_output_shard_is_a_slice():
    whole = output_keep(STATE, 0.4, 3, 5, 20)
    shard = output_keep(STATE, 0.4, 1, 2, 9, batch_start=2, query_start=3, feature_start=5)
    np.testing.assert_array_equal(shard, whole[2:, 3:, 5:14])


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty_masks(shape):
    assert attention_keep(STATE, 0.5, *shape).shape == shape
    assert output_keep(STATE, 0.5, *shape[1:]).shape == shape[1:]


def test_extreme_probabilities():
    assert attention_keep(STATE, 0.0, 2, 2, 8, 64).all()
    assert not attention_keep(STATE, 1.0, 2, 2, 8, 64).any()
    assert random.keep_scale(1.0) == 0.0
    assert random.keep_scale(0.75) == 4.0


def test_probability_is_met():
    assert abs(attention_keep(STATE, 0.25, 4, 4, 64, 64).mean() - 0.75) < 0.01


def test_every_part_of_the_state_matters():
    masks = [
        attention_keep((seed, offset), 0.5, 1, 1, 8, 64)
        for seed, offset in [(1, 0), (1, 1), (2, 0), (1 << 32, 0), (1 + (1 << 32), 0)]
    ]
    for i, one in enumerate(masks):
        assert all(0.4 < (one == other).mean() < 0.6 for other in masks[:i])


def test_negative_seed_is_its_two_s_complement():
    np.testing.assert_array_equal(
        attention_keep((-1, 0), 0.5, 1, 1, 2, 9), attention_keep((2**64 - 1, 0), 0.5, 1, 1, 2, 9)
    )


def test_indices_wrap_at_32_bits():
    keep = attention_keep((5, 2**32 + 3), 0.5, 1, 1, 2, 9, batch_start=2**32 - 1, head_start=2, total_heads=3)
    sample = ((2**32 - 1) * 3 + 2) % 2**32
    expected = [[scalar_keep(5, 3, 0.5, j, i, sample) for j in range(9)] for i in range(2)]
    np.testing.assert_array_equal(keep[0, 0], expected)


def test_seed_restarts_the_sequence():
    random.seed(11)
    first = [random.next_state(), random.next_state(2), random.next_state()]
    assert first == [(11, 0), (11, 1), (11, 3)]
    random.seed(11)
    assert random.next_state() == first[0]


def test_draws_are_atomic():
    random.seed(0)
    drawn: list[int] = []

    def draw() -> None:
        drawn.extend([random.next_state(2).offset for _ in range(500)])

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(drawn) == list(range(0, 4000, 2))


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_bad_probability(p):
    with pytest.raises(ValueError, match="between 0 and 1"):
        attention_keep(STATE, p, 1, 1, 1, 1)


def test_bad_calls():
    with pytest.raises(TypeError, match="float"):
        random.seed(1.5)
    with pytest.raises(ValueError, match="count is 0"):
        random.next_state(0)
    with pytest.raises(ValueError, match="total_heads=3"):
        attention_keep(STATE, 0.5, 1, 2, 1, 1, head_start=2, total_heads=3)


def test_no_state_is_drawn_for_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays of a CUDA graph repeat what was drawn at its capture."""
    captured = [False]
    stream = SimpleNamespace(is_capturing=lambda: captured[0])
    cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: stream), ndarray=type("ndarray", (), {}))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    random.next_state()
    captured[0] = True
    with pytest.raises(RuntimeError, match="every replay would repeat this dropout mask"):
        random.next_state()
