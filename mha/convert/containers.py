"""The containers of tensors: safetensors, in shards with an index too, and npz; never pickle."""

from __future__ import annotations

import json
import lzma
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha.convert.reading import some
from mha.optional import bfloat16, progress, safetensors, safetensors_errors

Array = NDArray[Any]

INDEX = "model.safetensors.index.json"
_MOST_INDEX_BYTES = 100 * 2**20
#: What NumPy itself takes, but after it has read as many bytes as the file asks it to.
_MOST_HEADER_BYTES = 10_000


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


@contextmanager
def contents(path: Path) -> Iterator[Contents]:
    """An open file's tensors; whatever is wrong with it becomes one ValueError."""
    path = _the_file(path)
    try:
        with _opener(path)(path) as found:
            yield found
    except (ImportError, OSError):
        raise
    except Refused as error:
        raise ValueError(f"{path} {error} Fetch or write the file again.") from None
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged or no {path.suffix} file: {error}. Fetch or write it again.") from error


class Refused(Exception):
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
    raise Refused("is neither .safetensors, .npz nor an .index.json, and no other format is read.")


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
                raise Refused(f"has {name} in {dtype}, which NumPy has no dtype for.") from None
            return x

        yield Contents({name: stored(name) for name in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118


@contextmanager
def _sharded(path: Path) -> Iterator[Contents]:
    if path.stat().st_size > _MOST_INDEX_BYTES:
        raise Refused(f"is larger than {_MOST_INDEX_BYTES} bytes, which no index is.")
    index = json.loads(path.read_bytes())
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise Refused("has no weight_map of tensors to files.")
    names = sorted(set(shards.values()))
    wrong = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if wrong:
        raise Refused(f"names {some(wrong)}, which are no safetensors files in its own folder.")
    with ExitStack() as stack:
        opened = {name: stack.enter_context(_safetensors(path.with_name(name))) for name in names}
        absent = [name for name, shard in shards.items() if name not in opened[shard].tensors]
        if absent:
            raise Refused(f"places {some(absent)} in shards that do not have them.")
        notes = {name: text for shard in opened.values() for name, text in shard.metadata.items()}
        yield Contents({name: opened[shard].tensors[name] for name, shard in shards.items()}, notes)


@contextmanager
def _npz(path: Path) -> Iterator[Contents]:
    with zipfile.ZipFile(path) as archive:
        others = [name for name in archive.namelist() if not name.endswith(".npy")]
        if others:
            raise Refused(f"holds {some(others)}, which are no arrays.")
        names = [name.removesuffix(".npy") for name in archive.namelist()]

        def read(name: str) -> Array:
            with archive.open(f"{name}.npy") as stream:
                x: Array = np.lib.format.read_array(stream, allow_pickle=False)
            return x.view(bfloat16) if x.dtype == _TWO_BYTES and bfloat16 is not None else x

        def stored(name: str) -> Stored:
            with archive.open(f"{name}.npy") as stream:
                version = np.lib.format.read_magic(stream)
                length = int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little")
            if length > _MOST_HEADER_BYTES:
                raise Refused(f"says that the header of {name} has {length} bytes.")
            with archive.open(f"{name}.npy") as stream:
                np.lib.format.read_magic(stream)
                shape, _, dtype = _HEADERS[version](stream)
            size = archive.getinfo(f"{name}.npy").file_size
            if math.prod(shape) * dtype.itemsize > size:
                raise Refused(f"says that {name} has shape {shape}, {dtype}, in {size} bytes.")
            return Stored(shape, lambda: read(name))

        notes = {name.removeprefix(_NOTE): str(read(name)) for name in names if name.startswith(_NOTE)}
        yield Contents({name: stored(name) for name in names if not name.startswith(_NOTE)}, notes)


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
#: How NumPy writes bfloat16.
_TWO_BYTES = np.dtype("V2")
#: Before the names of notes in an npz file, which has no place for them.
_NOTE = "__metadata__/"


def write(path: Path, arrays: dict[str, Array], notes: dict[str, str], kind: str) -> None:
    """A file of the kind that a suffix names."""
    if kind == ".safetensors":
        safetensors().numpy.save_file(arrays, path, notes or None)
    else:
        _save_npz(path, arrays, notes)


def _save_npz(path: Path, arrays: dict[str, Array], notes: dict[str, str]) -> None:
    every = arrays | {_NOTE + name: np.array(text) for name, text in notes.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, x in every.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, x, allow_pickle=False)
