"""PackedLayout against MegEngine's recorded layers, and its rules on random layouts."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from mha.packing import PackedEntry, PackedLayout

# Layers recorded from MegEngine 1.13.0 on the CPU: sizes, inputs, io_weight_bias, output.
RECORDED = dict(np.load(Path(__file__).parent / "data" / "megengine_layouts.npz"))
SEEDS = range(60)


def random_layout(seed: int) -> PackedLayout:
    """Any valid layout: grouped heads, absent projections, foreign widths, some biases."""
    rng = np.random.default_rng(seed)
    kv_heads, group, width = (int(n) for n in rng.integers(1, 5, 3))
    heads = kv_heads * group
    head_dim = heads * width if (whole_query := rng.random() < 0.3) else width
    whole_key, whole_value, no_output = rng.random(3) < 0.3
    sizes = {
        "qproj_size": 0 if whole_query else heads * head_dim,
        "kproj_size": 0 if whole_key else kv_heads * head_dim,
        "vproj_size": 0 if whole_value else kv_heads * int(rng.integers(1, 5)),
        "oproj_size": 0 if no_output else int(rng.integers(1, 9)),
    }
    biases = {f"{x}bias": bool(sizes[f"{x}proj_size"] and rng.random() < 0.5) for x in "qkvo"}
    kdim = head_dim if whole_key else int(rng.integers(0, 9))
    return PackedLayout(
        heads * width, heads, kdim=kdim, vdim=int(rng.integers(1, 9)), num_kv_heads=kv_heads, **sizes, **biases
    )


def dense_layer(layout: PackedLayout, buffer: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray):
    """A whole layer in float64, straight from the definition."""
    views = {name: view.astype(np.float64) for name, view in layout.views(buffer).items()}

    def project(x: np.ndarray, letter: str) -> np.ndarray:
        return x @ views.get(f"{letter}_weight", np.eye(x.shape[-1])) + views.get(f"{letter}_bias", 0.0)

    def heads(x: np.ndarray, letter: str) -> np.ndarray:
        y = project(x, letter)
        parts = np.split(y, layout.num_heads, axis=-1) if f"{letter}_weight" in views else [y] * layout.num_heads
        return np.stack(parts, axis=1)

    q, k, v = heads(query, "q"), heads(key, "k"), heads(value, "v")
    scores = np.exp(layout.scale * q @ k.swapaxes(-1, -2))
    output = scores / scores.sum(axis=-1, keepdims=True) @ v
    return project(np.concatenate(list(output.swapaxes(0, 1)), axis=-1), "o")


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in RECORDED}))
def test_reads_megengine_vectors(case: str) -> None:
    arrays = {key.split("/")[1]: array for key, array in RECORDED.items() if key.startswith(f"{case}/")}
    layout = PackedLayout(**json.loads(str(arrays["layout"])))
    assert layout.length == arrays["io_weight_bias"].size
    assert layout.output_size == arrays["output"].shape[-1]
    inputs = (arrays[name].astype(np.float64) for name in ("query", "key", "value"))
    output = dense_layer(layout, arrays["io_weight_bias"], *inputs)
    np.testing.assert_allclose(output, arrays["output"], rtol=2e-5, atol=2e-6)


def test_order_shapes_and_offsets() -> None:
    layout = PackedLayout(
        6, 2, kdim=5, vdim=3, vproj_size=4, oproj_size=7, qbias=True, kbias=True, vbias=True, obias=True
    )
    assert layout.entries == (
        ("q_weight", 0, (6, 6)),
        ("k_weight", 36, (5, 6)),
        ("v_weight", 66, (3, 4)),
        ("o_weight", 78, (4, 7)),
        ("q_bias", 106, (6,)),
        ("k_bias", 112, (6,)),
        ("v_bias", 118, (4,)),
        ("o_bias", 122, (7,)),
    )
    assert layout.length == 129
    assert all(isinstance(entry, PackedEntry) for entry in layout.entries)


def test_none_means_embed_dim_and_zero_means_absent() -> None:
    layout = PackedLayout(8, 2, oproj_size=0)
    assert (layout.kdim, layout.vdim, layout.num_kv_heads) == (8, 8, 2)
    assert (layout.qproj_size, layout.kproj_size, layout.vproj_size, layout.oproj_size) == (8, 8, 8, 0)
    assert [entry.name for entry in layout.entries] == ["q_weight", "k_weight", "v_weight"]
    empty = PackedLayout(8, 2, qproj_size=0, kproj_size=0, vproj_size=0, oproj_size=0)
    assert (empty.length, empty.entries, empty.views(np.zeros((1, 0)))) == (0, (), {})
    assert empty.pack({}).dtype == np.float32


def test_grouped_heads() -> None:
    layout = PackedLayout(12, 6, num_kv_heads=2, vproj_size=10)
    assert (layout.kproj_size, layout.vproj_size, layout.q_head_dim, layout.v_head_dim) == (4, 10, 2, 5)
    assert {name: shape for name, _, shape in layout.entries}["o_weight"] == (30, 12)
    assert PackedLayout(12, 6, num_kv_heads=6) == PackedLayout(12, 6)
    assert PackedLayout(12, 6, num_kv_heads=2, oproj_size=0).output_size == 12


@pytest.mark.parametrize(
    ("options", "scale", "output_size"),
    [
        ({}, 4**-0.5, 8),
        ({"qproj_size": 16, "kproj_size": 16}, 4**-0.5, 8),
        ({"qproj_size": 0, "kproj_size": 0, "oproj_size": 3}, 8**-0.5, 3),
        ({"qproj_size": 0, "kproj_size": 16, "oproj_size": 0}, 8**-0.5, 8),
        ({"vproj_size": 6, "oproj_size": 0}, 4**-0.5, 6),
        ({"vproj_size": 0, "vdim": 5, "oproj_size": 0}, 4**-0.5, 10),
    ],
)
def test_scale_and_output_size(options: dict[str, int], scale: float, output_size: int) -> None:
    layout = PackedLayout(8, 2, **options)
    assert layout.scale == scale
    assert layout.output_size == output_size


@pytest.mark.parametrize("seed", SEEDS)
def test_pack_and_views_are_inverse(seed: int) -> None:
    layout = random_layout(seed)
    rng = np.random.default_rng(seed)
    dtype = rng.choice(["float16", "float32", "float64"])
    buffer = rng.standard_normal(layout.length).astype(dtype)
    views = layout.views(buffer)
    assert list(views) == [entry.name for entry in layout.entries]
    transposed = {name: np.asfortranarray(view) for name, view in views.items()}
    for repacked in (layout.pack(views), layout.pack(dict(reversed(transposed.items())))):
        assert repacked.tobytes() == buffer.tobytes()
        assert repacked.dtype == (buffer.dtype if layout.entries else np.float32)
        assert not np.shares_memory(repacked, buffer)


@pytest.mark.parametrize("seed", SEEDS)
def test_pieces_tile_the_buffer(seed: int) -> None:
    layout = random_layout(seed)
    assert [entry.offset for entry in layout.entries] == [0, *(entry.stop for entry in layout.entries)][
        : len(layout.entries)
    ]
    assert sum(math.prod(entry.shape) for entry in layout.entries) == layout.length
    buffer = np.zeros((1, layout.length))
    for number, view in enumerate(layout.views(buffer).values(), start=1):
        view += number
    expected = [np.full(math.prod(entry.shape), n) for n, entry in enumerate(layout.entries, start=1)]
    np.testing.assert_array_equal(buffer[0], np.concatenate([[], *expected]))


@pytest.mark.parametrize("seed", SEEDS)
def test_layouts_are_values(seed: int) -> None:
    layout = random_layout(seed)
    for twin in (eval(repr(layout)), pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
        assert twin == layout
        assert hash(twin) == hash(layout)
        assert twin.entries == layout.entries
    assert dataclasses.replace(layout, qbias=False, kbias=False, vbias=False, obias=False).length <= layout.length
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.embed_dim = 1


def test_numpy_integers_and_bools_are_resolved_to_plain_ones() -> None:
    layout = PackedLayout(np.int64(8), np.int32(2), kdim=np.uint8(3), qbias=np.True_)
    assert repr(layout) == repr(PackedLayout(8, 2, kdim=3, qbias=True))


def test_views_follow_the_writeable_flag() -> None:
    layout = PackedLayout(4, 2)
    buffer = np.zeros(layout.length, np.float32)
    buffer.flags.writeable = False
    assert not layout.views(buffer)["q_weight"].flags.writeable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"oproj_size": -1}, "oproj_size is -1"),
        ({"vdim": -2}, "vdim is -2"),
        ({"num_heads": 3}, "qproj_size 8 is not divisible by its 3 heads"),
        ({"vproj_size": 7}, "vproj_size 7 is not divisible by its 2 heads"),
        ({"num_heads": 4, "num_kv_heads": 2, "kproj_size": 5}, "kproj_size 5 is not divisible by its 2 heads"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
        ({"kproj_size": 6}, "query heads are 4 wide .* but key heads 3"),
        ({"qproj_size": 0}, "query heads are 8 wide .* but key heads 4"),
        ({"kproj_size": 0, "kdim": 5}, "query heads are 4 wide .* but key heads 5"),
        ({"num_heads": 16, "qproj_size": 16, "kproj_size": 16}, "embed_dim 8 is smaller than num_heads 16"),
        ({"num_heads": 16, "qproj_size": 0, "num_kv_heads": 2}, "embed_dim 8 is smaller than num_heads 16"),
        ({"qproj_size": 0, "kproj_size": 0, "qbias": True}, "qbias is set but qproj_size is 0"),
        ({"oproj_size": 0, "obias": True}, "obias is set but oproj_size is 0"),
    ],
)
def test_impossible_layouts(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedLayout(**{"embed_dim": 8, "num_heads": 2, "vproj_size": 0, "oproj_size": 2} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 8.0}, "embed_dim is 8.0 of type float"),
        ({"num_heads": True}, "num_heads is True of type bool"),
        ({"kdim": "8"}, "kdim is '8' of type str"),
        ({"kdim": np.zeros(2, int)}, "kdim is .* of type ndarray"),
        ({"qbias": np.zeros(8)}, "qbias is a ndarray, not a bool"),
        ({"kbias": None}, "kbias is a NoneType, not a bool"),
    ],
)
def test_wrong_types(options: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PackedLayout(**{"embed_dim": 8, "num_heads": 2} | options)


def test_views_refuse_what_they_cannot_alias() -> None:
    layout = PackedLayout(4, 2, oproj_size=0)
    with pytest.raises(ValueError, match=r"shape \(49,\), 49 elements, but this layout has 48: q_weight \(4, 4\)"):
        layout.views(np.zeros(49))
    with pytest.raises(ValueError, match="not C-contiguous"):
        layout.views(np.zeros((12, 4), order="F"))
    with pytest.raises(ValueError, match="not C-contiguous"):
        layout.views(np.zeros(96)[::2])
    with pytest.raises(TypeError, match="list, not an array"):
        layout.views([0.0] * 48)


def test_pack_refuses_parts_that_do_not_fit() -> None:
    layout = PackedLayout(4, 2, oproj_size=0, qbias=True)
    parts = layout.views(np.zeros(layout.length, np.float32))
    with pytest.raises(ValueError, match=r"missing: \['q_bias'\].*does not have: \['o_bias'\]"):
        layout.pack({name.replace("q_bias", "o_bias"): part for name, part in parts.items()})
    with pytest.raises(ValueError, match=r"q_bias \(1, 4\), not \(4,\)"):
        layout.pack(parts | {"q_bias": np.zeros((1, 4), np.float32)})
    with pytest.raises(TypeError, match=r"differ in dtype: .*q_bias float64"):
        layout.pack(parts | {"q_bias": np.zeros(4)})
    with pytest.raises(TypeError, match="q_bias has dtype int64"):
        layout.pack(parts | {"q_bias": np.zeros(4, np.int64)}, dtype=np.float32)
    with pytest.raises(TypeError, match="the vector has dtype complex64"):
        layout.pack(parts, dtype=np.complex64)
    with pytest.raises(TypeError, match="part q_bias is a list"):
        layout.pack(parts | {"q_bias": [0.0] * 4})
    with pytest.raises(TypeError, match="numpy arrays but xp is math"):
        layout.pack(parts, xp=math)


def test_pack_converts_to_a_given_dtype() -> None:
    layout = PackedLayout(4, 2, obias=True)
    parts = layout.views(np.linspace(-1, 1, layout.length)) | {"o_bias": np.full(4, 0.1, np.float32)}
    assert layout.pack(parts, dtype=np.float16).dtype == np.float16
    np.testing.assert_array_equal(layout.pack(parts, dtype="float64")[-4:], np.float32(0.1))
