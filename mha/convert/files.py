"""Tensors from and to files: safetensors, in shards with an index too, and npz; never pickle."""

from __future__ import annotations

import json
import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha.convert.auto import Probe, auto, find_layers, verified
from mha.convert.parameters import Layer, PackedParameters
from mha.convert.reading import some, under
from mha.convert.systems import FROM
from mha.optional import bfloat16, progress, safetensors, safetensors_errors
from mha.packing import PackedLayout

Array = NDArray[Any]

INDEX = "model.safetensors.index.json"
#: Of the metadata of a file: the layouts of its packed layers, JSON by their prefixes.
LAYOUTS = "mha.layouts"
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_MOST_INDEX_BYTES = 100 * 2**20


class Stored(NamedTuple):
    """A tensor in a file, known by its shape until it is read."""

    shape: tuple[int, ...]
    read: Callable[[], Array]


class Contents(NamedTuple):
    """What a file holds: tensors by name, and its metadata."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]

    def arrays(self, prefix: str = "") -> dict[str, Array]:
        """Those whose names begin with `prefix`, read, by their full names."""
        wanted = {name: stored for name, stored in self.tensors.items() if name.startswith(prefix)}
        return {name: stored.read() for name, stored in progress(wanted.items(), "reading")}


def load(
    path: str | os.PathLike[str],
    num_heads: int | None = None,
    prefix: str | None = None,
    *,
    format: str | None = None,
    num_kv_heads: int | None = None,
    verify: Probe | None = None,
) -> PackedParameters:
    """Pack one attention layer of a model in a file.

    Parameters
    ----------
    path : path
        ``.safetensors``, ``.npz``, the ``.index.json`` of a model in shards, or a folder with one of these.
    num_heads, num_kv_heads : int, optional
        None is what ``config.json`` beside the file says, if there is one, or the shapes.
    prefix : str, optional
        Of the layer; None if the file has one layer only.
    format : str, optional
        One of ``mha.convert.FORMATS``; None is what the names say, see `auto`.
    verify : Probe, optional
        What the layer should answer.

    Returns
    -------
    PackedParameters
        Of the file's dtype; bfloat16 needs ml_dtypes.

    Raises
    ------
    ValueError
        If the file is damaged or no such file, has no such layer or several, or as `auto`.
    ImportError
        For safetensors without the package of that name.
    OSError
        If the file cannot be read.
    """
    path = Path(path)
    with contents(path) as found:
        packed = layouts(found)
        layers = [*packed, *find_layers(found.tensors)] if prefix is None else [prefix]
        arrays = found.arrays(layers[0]) if len(layers) == 1 else {}
    if len(layers) != 1:
        raise ValueError(f"{path} has {len(layers)} attention layers, {some(layers)}. Give the prefix of one.")
    (prefix,) = layers
    if prefix in packed and format in (None, "packed"):
        return verified(own_layer(path, under(arrays, prefix), packed[prefix]), verify)
    heads, kv_heads = heads_beside(path)
    num_heads = heads if num_heads is None else num_heads
    num_kv_heads = kv_heads if num_kv_heads is None else num_kv_heads
    if format is None:
        return auto(arrays, num_heads, prefix, num_kv_heads=num_kv_heads, verify=verify)
    if format not in FROM:
        raise ValueError(f"format {format!r} is none of {', '.join(FROM)}. Choose one, or None.")
    return verified(FROM[format](arrays, num_heads, prefix, num_kv_heads=num_kv_heads), verify)


def load_tensors(path: str | os.PathLike[str], prefix: str = "") -> dict[str, Array]:
    """The tensors of a file as arrays, all or those whose names begin with `prefix`; errors as `load`."""
    with contents(Path(path)) as found:
        return found.arrays(prefix)


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Array] | PackedParameters,
    prefix: str = "",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors, or one packed layer, to a ``.safetensors`` or ``.npz`` file, whole or not at all.

    Parameters
    ----------
    path : path
    tensors : mapping of str to array, or PackedParameters
        NumPy arrays. Of a packed layer ``io_weight_bias``, ``bias_k`` and ``bias_v`` are written, and its layout into
        the metadata, from where `load` reads it.
    prefix : str
        Put before every name.
    metadata : mapping of str to str, optional

    Raises
    ------
    ValueError
        For another suffix.
    ImportError
        For safetensors without the package of that name.
    """
    path, notes = Path(path), dict(metadata or {})
    if isinstance(tensors, PackedParameters):
        notes[LAYOUTS] = json.dumps({prefix: described(tensors)})
        tensors = own_tensors(tensors)
    # Not ascontiguousarray, which gives a number an axis.
    arrays = {prefix + name: np.asarray(x, order="C") for name, x in tensors.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".safetensors":
            safetensors().numpy.save_file(arrays, partial, notes or None)
        elif path.suffix == ".npz":
            _save_npz(partial, arrays, notes)
        else:
            raise ValueError(f"{path} is neither .safetensors nor .npz. Choose one of these suffixes.")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def own_tensors(parameters: PackedParameters) -> dict[str, Array]:
    """A packed layer's arrays by name."""
    named = {name: getattr(parameters, name) for name in ("io_weight_bias", "bias_k", "bias_v")}
    return {name: x for name, x in named.items() if x is not None}


def described(parameters: PackedParameters) -> dict[str, Any]:
    """A packed layer's layout and scale as plain values."""
    layout = parameters.layout
    return {name: getattr(layout, name) for name in PackedLayout.__annotations__} | {"scale": parameters.scale}


@contextmanager
def contents(path: Path) -> Iterator[Contents]:
    """An open file's tensors; whatever is wrong with it becomes one ValueError."""
    path = _the_file(path)
    try:
        with _opener(path)(path) as found:
            yield found
    except (ImportError, OSError):
        raise
    except _Refused as error:
        raise ValueError(f"{path} {error} Fetch or write the file again.") from None
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged or no {path.suffix} file: {error}. Fetch or write it again.") from error


class _Refused(Exception):
    """What a file says about itself that cannot be."""


#: What readers raise on bytes that are not what they should be.
_DAMAGE: tuple[type[Exception], ...] = (
    ValueError, KeyError, TypeError, EOFError, MemoryError, OverflowError, SyntaxError, zipfile.BadZipFile, zlib.error,
    NotImplementedError, RecursionError, RuntimeError, lzma.LZMAError, *safetensors_errors(),
)  # fmt: skip


def _the_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (INDEX, "model.safetensors"):
        if (path / name).exists():
            return path / name
    raise ValueError(f"{path} is a folder without {INDEX} or model.safetensors. Give the file.")


def _opener(path: Path) -> Callable[[Path], AbstractContextManager[Contents]]:
    for suffix, opener in ((".index.json", _sharded), (".safetensors", _safetensors), (".npz", _npz)):
        if path.name.endswith(suffix):
            return opener
    raise _Refused("is neither .safetensors, .npz nor an .index.json, and no other format is read.")


@contextmanager
def _safetensors(path: Path) -> Iterator[Contents]:
    library = safetensors()
    with library.safe_open(path, framework="numpy") as file:

        def stored(name: str) -> Stored:
            return Stored(tuple(file.get_slice(name).get_shape()), lambda: read(name))

        def read(name: str) -> Array:
            dtype = file.get_slice(name).get_dtype()
            if dtype == "BF16" and bfloat16 is None:
                raise ImportError(f"{name} is bfloat16, which NumPy lacks. Install ml_dtypes.")
            try:
                x: Array = file.get_tensor(name)
            except AttributeError:
                raise _Refused(f"has {name} in {dtype}, which NumPy has no dtype for.") from None
            return x

        yield Contents({name: stored(name) for name in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118


@contextmanager
def _sharded(path: Path) -> Iterator[Contents]:
    if path.stat().st_size > _MOST_INDEX_BYTES:
        raise _Refused(f"is larger than {_MOST_INDEX_BYTES} bytes, which no index is.")
    index = json.loads(path.read_bytes())
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise _Refused("has no weight_map of tensors to files.")
    names = sorted(set(shards.values()))
    wrong = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if wrong:
        raise _Refused(f"names {some(wrong)}, which are no safetensors files in its own folder.")
    with ExitStack() as stack:
        opened = {name: stack.enter_context(_safetensors(path.with_name(name))) for name in names}
        absent = [name for name, shard in shards.items() if name not in opened[shard].tensors]
        if absent:
            raise _Refused(f"places {some(absent)} in shards that do not have them.")
        yield Contents({name: opened[shard].tensors[name] for name, shard in shards.items()}, {})


@contextmanager
def _npz(path: Path) -> Iterator[Contents]:
    with zipfile.ZipFile(path) as archive:
        others = [name for name in archive.namelist() if not name.endswith(".npy")]
        if others:
            raise _Refused(f"holds {some(others)}, which are no arrays.")
        names = [name.removesuffix(".npy") for name in archive.namelist()]

        def read(name: str) -> Array:
            with archive.open(f"{name}.npy") as stream:
                x: Array = np.lib.format.read_array(stream, allow_pickle=False)
            return x.view(bfloat16) if x.dtype == _TWO_BYTES and bfloat16 is not None else x

        def stored(name: str) -> Stored:
            with archive.open(f"{name}.npy") as stream:
                header = _HEADERS[np.lib.format.read_magic(stream)]
                shape, _, dtype = header(stream)
            size = archive.getinfo(f"{name}.npy").file_size
            if math.prod(shape) * dtype.itemsize > size:
                raise _Refused(f"says that {name} has shape {shape}, {dtype}, in {size} bytes.")
            return Stored(shape, lambda: read(name))

        notes = {name.removeprefix(_NOTE): str(read(name)) for name in names if name.startswith(_NOTE)}
        yield Contents({name: stored(name) for name in names if not name.startswith(_NOTE)}, notes)


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
#: How NumPy writes bfloat16.
_TWO_BYTES = np.dtype("V2")
#: Before the names of notes in an npz file, which has no place for them.
_NOTE = "__metadata__/"


def _save_npz(path: Path, arrays: dict[str, Array], notes: dict[str, str]) -> None:
    every = arrays | {_NOTE + name: np.array(text) for name, text in notes.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, x in every.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, x, allow_pickle=False)


def layouts(found: Contents) -> dict[str, dict[str, Any]]:
    """Of its packed layers, by their prefixes."""
    if LAYOUTS not in found.metadata:
        return {}
    stated = json.loads(found.metadata[LAYOUTS])
    if not isinstance(stated, dict) or not all(isinstance(x, dict) for x in stated.values()):
        raise _Refused(f"has metadata {LAYOUTS} that is not a layout for each prefix.")
    return stated


def own_layer(path: Path, arrays: dict[str, Array], options: dict[str, Any]) -> PackedParameters:
    """A packed layer as `save` wrote it."""
    try:
        given = dict(options)
        scale = given.pop("scale")
        layout = PackedLayout(given.pop("embed_dim"), given.pop("num_heads"), **given)
        rows = arrays.get("bias_k"), arrays.get("bias_v")
        parameters = PackedParameters(arrays["io_weight_bias"], layout, *rows, scale)
        Layer.unpacked(parameters)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a packed layer that contradicts its layout: {error}. Write it again.") from error
    return parameters


def heads_beside(path: str | os.PathLike[str]) -> tuple[int | None, int | None]:
    """Query and key heads that the ``config.json`` beside a file, or in a folder, states; None where it does not."""
    path = Path(path)
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        stated = json.loads(config.read_bytes()) if config.stat().st_size < _MOST_INDEX_BYTES else {}
    except (OSError, ValueError):
        return None, None
    if not isinstance(stated, dict):
        return None, None
    heads, kv_heads = (
        next((stated[name] for name in names if type(stated.get(name)) is int), None) for names in (_HEADS, _KV_HEADS)
    )
    if stated.get("multi_query") and not stated.get("new_decoder_architecture"):
        kv_heads = 1  # Falcon's configuration states the query heads there.
    return heads, kv_heads
