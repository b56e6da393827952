"""Files: round trips, shards, and what damage does."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mha.convert import FROM, TO, load, load_tensors, save
from mha.convert.containers import INDEX, contents
from mha.convert.files import LAYOUTS, described, own_tensors
from mha.optional import bfloat16

from .layers import for_format, random_layer
from .test_auto import probe_of
from .test_formats import same

ST = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
SUFFIXES = (".safetensors", ".npz")
PREFIX = "layers.0.attn."


def model(seed: int = 0) -> dict[str, np.ndarray]:
    """Two layers and something else."""
    state = TO["gpt2"](for_format("gpt2", seed), PREFIX)
    state |= TO["gpt2"](for_format("gpt2", seed + 1), "layers.1.attn.")
    return {name: x.copy() for name, x in state.items()} | {"norm.weight": np.ones(7, "f4")}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"] + ([] if bfloat16 is None else [bfloat16]), ids=str)
def test_round_trip(suffix: str, dtype: Any, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    parameters = for_format("llama", dtype=dtype, kv_heads=2)
    save(path, TO["llama"](parameters), PREFIX, {"made by": "a test"})
    assert same(load(path, 4, num_kv_heads=2), parameters)
    assert same(load(path, 4, PREFIX, format="llama", num_kv_heads=2), parameters)
    tensors = load_tensors(path, PREFIX + "q")
    assert set(tensors) == {PREFIX + "q_proj.weight", PREFIX + "q_proj.bias"}
    assert sorted(x.name for x in tmp_path.iterdir()) == [path.name], "nothing temporary is left"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_packed_layers_keep_their_layout(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"layer{suffix}"
    parameters = random_layer(bias=False, kbias=True, kdim=5, kv_heads=2, scale=0.3)
    parameters = parameters._replace(bias_k=np.ones((1, 1, 6), "f4"), bias_v=np.full((1, 1, 6), 2, "f4"))
    save(path, parameters, "a.")
    assert same(load(path), parameters)
    tensors = load_tensors(path)
    save(path, tensors | {"a.io_weight_bias": tensors["a.io_weight_bias"][1:]}, metadata=notes(path))
    with pytest.raises(ValueError, match="contradicts its layout"):
        load(path)


def notes(path: Path) -> dict[str, str]:
    with contents(path) as found:
        return found.metadata


def test_several_layers_need_a_prefix(tmp_path: Path) -> None:
    save(tmp_path / "m.npz", model())
    with pytest.raises(
        ValueError, match=r"m.npz has 2 attention layers, \['layers.0.attn.', 'layers.1.attn.'\]. Give the prefix"
    ):
        load(tmp_path / "m.npz", 4)
    assert same(load(tmp_path / "m.npz", 4, "layers.1.attn."), for_format("gpt2", 1))
    save(tmp_path / "n.npz", {"x": np.ones(1)})
    with pytest.raises(ValueError, match="0 attention layers"):
        load(tmp_path / "n.npz", 4)
    with pytest.raises(ValueError, match="format 'gpt3' is none of torch, torch_separate, paddle"):
        load(tmp_path / "m.npz", 4, PREFIX, format="gpt3")


def test_heads_from_the_configuration(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", TO["llama"](for_format("llama", kv_heads=2)))
    with pytest.raises(ValueError, match="Give num_heads"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4, "num_key_value_heads": 2}))
    assert same(load(tmp_path), for_format("llama", kv_heads=2))
    for text in ("[]", "{", '{"num_attention_heads": "4"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="Give num_heads"):
            load(tmp_path)


def test_verify(tmp_path: Path) -> None:
    parameters = for_format("bloom")
    save(tmp_path / "m.npz", TO["bloom"](parameters))
    probe = probe_of("bloom", parameters)
    assert same(load(tmp_path / "m.npz", 4, verify=probe), parameters)
    assert same(load(tmp_path / "m.npz", 4, format="bloom", verify=probe), parameters)
    with pytest.raises(ValueError, match="does not answer what verify says"):
        load(tmp_path / "m.npz", 4, format="megatron_v0", verify=probe)


@pytest.mark.skipif(bfloat16 is None, reason="bfloat16 needs ml_dtypes")
def test_bfloat16_where_numpy_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "m.safetensors", TO["llama"](for_format("llama", dtype=bfloat16)))
    monkeypatch.setattr("mha.convert.containers.bfloat16", None)
    with pytest.raises(ImportError, match=r"bfloat16, which NumPy lacks\. Install ml_dtypes"):
        load_tensors(tmp_path / "m.safetensors")


def shards(folder: Path) -> Path:
    state = model()
    halves = dict(list(state.items())[::2]), dict(list(state.items())[1::2])
    where = {}
    for i, half in enumerate(halves):
        name = f"model-{i}.safetensors"
        ST.save_file({key: np.ascontiguousarray(x) for key, x in half.items()}, folder / name, {"format": "pt"})
        where |= dict.fromkeys(half, name)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return folder / INDEX


def test_shards(tmp_path: Path) -> None:
    index = shards(tmp_path)
    assert notes(index) == {"format": "pt"}
    for path in (index, tmp_path):
        assert same(load(path, 4, PREFIX), for_format("gpt2"))
    assert load_tensors(index).keys() == model().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": "../model-0.safetensors"}, "no safetensors files in its own folder"),
        ({"norm.weight": "/etc/passwd"}, "no safetensors files in its own folder"),
        ({"norm.weight": "model.bin"}, "no safetensors files in its own folder"),
        ({"absent": "model-0.safetensors"}, "places .*absent.* in shards that do not have them"),
        ({"norm.weight": 3}, "no weight_map of tensors to files"),
        ({"norm.weight": ["model-0.safetensors"]}, "no weight_map of tensors to files"),
    ],
)
def test_an_index_that_lies(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    index = shards(tmp_path)
    stated = json.loads(index.read_text())
    stated["weight_map"] |= change
    index.write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=message):
        load(index, 4, PREFIX)


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    index = shards(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        load(index, 4, PREFIX)
    for text in ("", "[]", "{}", "nonsense", '{"weight_map": []}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"damaged|no weight_map"):
            load(index, 4, PREFIX)


def damaged(data: bytes, kind: str, seed: int, suffix: str) -> bytes:
    """A file that something has happened to."""
    rng = np.random.default_rng(seed)
    if kind == "cut":
        return data[: int(rng.integers(0, len(data)))]
    if kind == "header":  # bytes of the part that says what is where
        end = 8 + struct.unpack("<Q", data[:8])[0] if suffix == ".safetensors" else 200
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 6))):
            changed[int(rng.integers(0, end))] = int(rng.integers(0, 256))
        return bytes(changed)
    if kind == "length":  # absurd sizes
        return struct.pack("<Q", int(rng.integers(2**20, 2**62))) + data[8:]
    if kind == "tail":
        return data[: -int(rng.integers(1, 500))]
    return rng.bytes(int(rng.integers(0, 2000)))  # "noise"


def outcome(path: Path) -> tuple[str | None, dict[str, np.ndarray]]:
    """The documented error's text, or the tensors."""
    try:
        return None, load_tensors(path)
    except ValueError as error:
        return str(error), {}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["cut", "header", "length", "tail", "noise"])
def test_damaged_bytes(kind: str, suffix: str, tmp_path: Path) -> None:
    """An error, always the same kind, or by luck the very tensors; 200 files in all."""
    path = tmp_path / f"m{suffix}"
    save(path, model())
    data, right = path.read_bytes(), load_tensors(path)
    refused = 0
    for seed in range(20):
        path.write_bytes(damaged(data, kind, seed, suffix))
        error, found = outcome(path)
        if error is not None:
            refused += 1
            assert str(path) in error
            assert error.endswith(("write it again.", "write the file again."))
        else:
            changed = [name for name in right if name not in found or found[name].tobytes() != right[name].tobytes()]
            assert kind == "header" or not changed
    assert refused >= (10 if kind == "header" else 20 if suffix == ".safetensors" else 19)


def header(entry: Any, size: int = 16) -> bytes:
    text = json.dumps(entry).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


F4 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
LIES = {
    "dtype": {"x": F4 | {"dtype": "F99"}},
    "no dtype": {"x": {"shape": [2, 2], "data_offsets": [0, 16]}},
    "shape": {"x": F4 | {"shape": [2, 3]}},
    "negative": {"x": F4 | {"shape": [-2, -2]}},
    "huge": {"x": F4 | {"shape": [2**40, 2**40]}},
    "beyond": {"x": F4 | {"data_offsets": [0, 2**40]}},
    "backwards": {"x": F4 | {"data_offsets": [16, 0]}},
    "overlap": {"x": F4, "y": F4},
    "hole": {"x": F4 | {"data_offsets": [4, 20]}},
    "list": [1, 2],
    "text": "x",
    "deep": {"x": F4 | {"shape": [[[[2]]]]}},
}


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(header(LIES[name], 16 if name != "hole" else 20))
    with pytest.raises(ValueError, match=r"m.safetensors is damaged or no .safetensors file"):
        load_tensors(path)


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    (tmp_path / "a.npz").write_bytes(pickle.dumps(Harm()))
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive, archive.open("x.npy", "w") as stream:
        np.lib.format.write_array(stream, np.array([Harm()], object), allow_pickle=True)
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ValueError, match="damaged"):
            load_tensors(tmp_path / name)
    assert not (tmp_path / "harm").exists()
    for name in ("m.bin", "m.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Harm()))
        with pytest.raises(ValueError, match=r"neither .safetensors, .npz"):
            load_tensors(tmp_path / name)


def test_an_npz_whose_array_is_larger_than_its_bytes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive, archive.open("x.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (2**50,)})
    with pytest.raises(ValueError, match=r"says that x has shape \(1125899906842624,\)"):
        load_tensors(tmp_path / "m.npz")
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(ValueError, match=r"damaged or no .npz file"):
        load_tensors(tmp_path / "one.npz")


@pytest.mark.parametrize(
    "change",
    [{"scale": "1"}, {"scale": float("nan")}, {"scale": -1}, {"scale": [1]}, {"embed_dim": 1.5}, {"num_heads": 0},
     {"num_heads": None}, {"qbias": 2}, {"more": 1}],
)  # fmt: skip
def test_layouts_that_cannot_be(change: dict[str, Any], tmp_path: Path) -> None:
    parameters = random_layer()
    layout = described(parameters) | change
    save(tmp_path / "m.npz", own_tensors(parameters), "a.", {LAYOUTS: json.dumps({"a.": layout})})
    with pytest.raises(ValueError, match=r"m.npz has a packed layer that contradicts its layout"):
        load(tmp_path / "m.npz")


def test_packed_layers_of_integers(tmp_path: Path) -> None:
    parameters = random_layer()
    arrays = {"io_weight_bias": parameters[0].astype("i4")}
    save(tmp_path / "m.npz", arrays, "a.", {LAYOUTS: json.dumps({"a.": described(parameters)})})
    with pytest.raises(ValueError, match=r"contradicts its layout: .*int32"):
        load(tmp_path / "m.npz")


def test_an_npz_with_an_endless_header(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b" " * 2**20)
    with pytest.raises(ValueError, match=r"says that the header of x has 2147483648 bytes"):
        load_tensors(tmp_path / "m.npz")


def layer_with(**changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = dict(TO["gpt2"](for_format("gpt2")))
    return {name: x for name, x in (state | changes).items() if x is not None}


@pytest.mark.parametrize("seed", range(100))
def test_tensors_that_are_not_the_layers(seed: int, tmp_path: Path) -> None:
    """Missing, extra, of another shape or dtype: 100 files."""
    rng = np.random.default_rng(seed)
    state = layer_with()
    name = str(rng.choice(list(state)))
    kind = ("missing", "extra", "shape", "dtype", "integer")[seed % 5]
    x = state[name]
    changes: dict[str, Any] = {
        "missing": {name: None}, "extra": {f"extra.{seed}": np.ones(3, "f4")},
        "shape": {name: np.ones((*x.shape[:-1], x.shape[-1] + int(rng.integers(1, 9))), "f4")},
        "dtype": {name: x.astype("f2")}, "integer": {key: y.astype("i4") for key, y in state.items()},
    }[kind]  # fmt: skip
    path = tmp_path / f"m{SUFFIXES[seed % 2]}"
    save(path, layer_with(**changes))
    with pytest.raises(TypeError if kind in ("dtype", "integer") else ValueError) as error:
        load(path, 4, "")
    assert (
        name in str(error.value)
        or kind in ("extra", "integer", "shape")
        or "no format has the names" in str(error.value)
    )


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    save(path, model())
    data = path.read_bytes()
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        save(path, {"x": np.ones(3), "y": np.array([object()])})
    assert path.read_bytes() == data
    assert [x.name for x in tmp_path.iterdir()] == ["m.npz"]
    with pytest.raises(ValueError, match=r"neither .safetensors nor .npz"):
        save(tmp_path / "m.bin", model())
    with pytest.raises(FileNotFoundError, match=r"absent is no folder. Make it first"):
        save(tmp_path / "absent" / "m.safetensors", model())


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_bytes(b"")
    (tmp_path / "m.npz").symlink_to(Path("blobs") / "0123")
    save(tmp_path / "m.npz", model())
    assert (tmp_path / "m.npz").is_symlink()
    assert load_tensors(tmp_path / "m.npz").keys() == model().keys()


def test_other_arrays(tmp_path: Path) -> None:
    """Tensors that want gradients, and a scale that is no Python number."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    module = torch.nn.MultiheadAttention(8, 2)
    save(tmp_path / "m.safetensors", dict(module.named_parameters()))
    expected = FROM["torch"](module.state_dict(), 2)
    assert same(load(tmp_path / "m.safetensors", 2), expected)
    save(tmp_path / "p.npz", expected._replace(scale=np.float32(0.5)))  # type: ignore[arg-type]
    assert load(tmp_path / "p.npz").scale == 0.5
