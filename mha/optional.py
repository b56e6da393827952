"""The only place that imports what may be absent, and the only one that knows which array libraries there are.

CuPy is never imported for its arrays' sake: an array that is CuPy's proves that the caller has done so.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Iterable
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

try:
    import ml_dtypes

    bfloat16: np.dtype[Any] | None = np.dtype(ml_dtypes.bfloat16)
except ImportError:
    ml_dtypes = None
    bfloat16 = None


T = TypeVar("T")

#: Array type -> the library it belongs to; `register_library` adds others.
_libraries: dict[type, ModuleType] = {np.ndarray: np}


def register_library(library: ModuleType, array_type: type) -> None:
    """Make arrays of this type known as those of `library`, which has what the package uses of NumPy."""
    _libraries[array_type] = library


def _library(x: Any) -> ModuleType | None:
    found = _libraries.get(type(x))
    if found is None:
        cupy = sys.modules.get("cupy")
        if cupy is not None:
            _libraries.setdefault(cupy.ndarray, cupy)
        found = next((library for kind, library in _libraries.items() if isinstance(x, kind)), None)
    return found


def is_array(x: Any) -> bool:
    """Whether `x` is an array of a library the package computes with."""
    return _library(x) is not None


def array_module(*arrays: Any) -> ModuleType:
    """The library that all of `arrays` belong to; NumPy if there are none. None arguments are passed over.

    Raises
    ------
    TypeError
        If an argument is no array, or arrays of different libraries meet.
    """
    libraries = {}
    for x in arrays:
        if x is None:
            continue
        library = _library(x)
        if library is None:
            raise TypeError(f"expected a NumPy or CuPy array, got {type(x).__name__}. Convert it first.")
        libraries[library.__name__] = library
    if len(libraries) > 1:
        raise TypeError(
            f"arrays of {' and '.join(sorted(libraries))} in one call; nothing is copied between devices. "
            "Move them to one library first."
        )
    return next(iter(libraries.values()), np)


def as_array(value: Any) -> NDArray[Any]:
    """`value` itself if it is an array, else a NumPy array of it; PyTorch tensors of any device and dtype included."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            if bfloat16 is None:
                raise TypeError(
                    "a tensor is bfloat16, which NumPy lacks. Install ml_dtypes, or convert it by .float()."
                )
            # torch does not hand its bfloat16 to NumPy, and float32 holds every value of it.
            value = value.float().numpy().astype(bfloat16)
    return value if is_array(value) else np.asarray(value)


def library_named(name: str) -> ModuleType:
    """NumPy, or CuPy where it is installed.

    Raises
    ------
    ImportError
        If the library is not installed.
    """
    return importlib.import_module(name)


def library_of_device(device: Any) -> ModuleType:
    """The library for arrays on a device as PyTorch and Paddle name it: None and "cpu" are NumPy's, "cuda" CuPy's.

    Raises
    ------
    ValueError
        For another device.
    ImportError
        For "cuda" without CuPy.
    """
    kind = str("cpu" if device is None else device).partition(":")[0]
    libraries = {"cpu": "numpy", "cuda": "cupy", "gpu": "cupy"}
    if kind not in libraries:
        raise ValueError(f"device is {device!r}, none of {', '.join(libraries)}. Pass None for NumPy arrays.")
    return library_named(libraries[kind])


def dtype_named(dtype: Any) -> np.dtype[Any]:
    """float32 for None; else a NumPy dtype, or what another framework calls one ("torch.float16").

    Raises
    ------
    TypeError
        If there is no such dtype, or bfloat16 is asked for without ml_dtypes.
    """
    name = "float32" if dtype is None else str(dtype).rpartition(".")[2]
    if name == "bfloat16" and bfloat16 is not None:
        return bfloat16
    return np.dtype(dtype if isinstance(dtype, (type, np.dtype)) else name)


def graph_is_captured() -> bool:
    """Whether CuPy's current stream records a CUDA graph instead of running what it is given."""
    cupy = sys.modules.get("cupy")
    try:
        return cupy is not None and bool(cupy.cuda.get_current_stream().is_capturing())
    except Exception:  # whatever CuPy says of a missing driver: then nothing is captured
        return False


def matplotlib_pyplot() -> ModuleType | None:
    """matplotlib.pyplot drawing to files, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def threadpool_info() -> list[dict[str, Any]]:
    """The thread pools loaded in this process, as threadpoolctl sees them; empty without it."""
    try:
        from threadpoolctl import threadpool_info as info
    except ImportError:
        return []
    return list(info())


def safetensors() -> ModuleType:
    """The package of that name, with its NumPy part.

    Raises
    ------
    ImportError
        If it is not installed.
    """
    try:
        importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise ImportError("safetensors files need the package of that name: pip install safetensors.") from error
    return importlib.import_module("safetensors")


def tokenizers() -> ModuleType:
    """The package of that name, for the demo of a text model.

    Raises
    ------
    ImportError
        If it is not installed.
    """
    return importlib.import_module("tokenizers")


def safetensors_errors() -> tuple[type[Exception], ...]:
    """What it raises on a damaged file; nothing where it is not installed."""
    try:
        return (importlib.import_module("safetensors").SafetensorError,)
    except ImportError:
        return ()


def progress(items: Collection[T], description: str) -> Iterable[T]:
    """The items, with a bar on standard error while they are taken if that is a terminal and rich is installed."""
    if not sys.stderr.isatty():
        return items
    try:
        console = importlib.import_module("rich.console").Console(stderr=True)
        bar: Iterable[T] = importlib.import_module("rich.progress").track(
            items, description, total=len(items), console=console, transient=True
        )
    except ImportError:
        return items
    return bar
