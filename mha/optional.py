"""The only place that imports what may be absent, and the only one that knows which array libraries there are.

CuPy is never imported from here: an array that is CuPy's proves that the caller has done so.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np

try:
    import ml_dtypes

    bfloat16: np.dtype[Any] | None = np.dtype(ml_dtypes.bfloat16)
except ImportError:
    ml_dtypes = None
    bfloat16 = None


def _library(x: Any) -> ModuleType | None:
    if isinstance(x, np.ndarray):
        return np
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(x, cupy.ndarray) else None


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
