"""Arrays of other libraries, taken without a copy through DLPack and answered in kind.

Memory of the CPU becomes NumPy arrays, memory of a CUDA device CuPy arrays; results go back through the `from_dlpack`
of the library that the arguments came from.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Collection
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from mha.optional import bfloat16, is_array, library_named

P = ParamSpec("P")
R = TypeVar("R")

#: First name of the module of an exporter's type -> the module with its `from_dlpack`, `int16` and `bfloat16`. A type
#: that is not here may name it itself, by `__array_namespace__`.
_NAMESPACES = {"torch": "torch", "jax": "jax.numpy", "jaxlib": "jax.numpy"}
#: DLPack's number for a kind of memory -> the library that takes it: CPU, CUDA, pinned and managed memory.
_LIBRARIES = {1: "numpy", 2: "cupy", 3: "numpy", 13: "cupy"}
#: Types of arguments that need no exchange. Asking this set is all that a call with NumPy arrays pays.
_PLAIN: set[type] = {np.ndarray, int, float, bool, type(None), str, tuple, list}


class _Kind(NamedTuple):
    """What the exporters in one call must have in common."""

    #: The module with the exporter's `from_dlpack`.
    namespace: Any
    library: str
    #: Number of the device; 0 for the CPU.
    device: int


def in_kind(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function`, of NumPy or CuPy arrays, take whatever exports DLPack and answer with arrays of the same library.

    The members of tuples are answered too, what is no array as it is. Nothing is copied, gradients are not recorded.

    Raises
    ------
    TypeError
        If arguments differ in library or device, or cannot be exported: one requires a gradient, for example.
    """
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def exchanging(*args: P.args, **options: P.kwargs) -> R:
        if _plain(args) and (not options or _plain(options.values())):
            return function(*args, **options)
        named = {**dict(zip(names, args, strict=False)), **options}
        members = _members(named)
        arrays = {name: x for name, x in members.items() if is_array(x) or _exports(x)}
        if all(map(is_array, arrays.values())):
            _PLAIN.update(type(x) for x in members.values() if not isinstance(x, tuple))
            return function(*args, **options)
        kind = _common_kind(arrays)
        library = _library(kind)
        # Kernels run on CuPy's current device, which need not be the one of the exporter's arrays.
        with nullcontext() if library is np else library.cuda.Device(kind.device):
            taken = {id(x): _taken(name, x, kind, library) for name, x in named.items() if name in arrays}
            own: Any = function
            result = own(
                *(taken.get(id(x), x) for x in args), **{name: taken.get(id(x), x) for name, x in options.items()}
            )
            if isinstance(result, tuple):
                given = [_given(x, kind) for x in result]
                return type(result)(*given) if hasattr(result, "_fields") else type(result)(given)  # type: ignore
            return _given(result, kind)

    return exchanging


def _plain(values: Collection[Any]) -> bool:
    """Whether it is certain that none of them, nor a member of a tuple among them, exports anything."""
    if _PLAIN.issuperset(map(type, values)):
        return True
    for x in values:
        if type(x) not in _PLAIN and not (isinstance(x, tuple) and _PLAIN.issuperset(map(type, x))):
            return False
    return True


def _exports(x: Any) -> bool:
    return hasattr(type(x), "__dlpack__") and hasattr(type(x), "__dlpack_device__")


def _members(named: dict[str, Any]) -> dict[str, Any]:
    """With the members of named tuples, results of an earlier call, in their place."""
    found: dict[str, Any] = {}
    for name, x in named.items():
        fields = getattr(type(x), "_fields", None)
        found |= {name: x} if fields is None else {f"{name}.{f}": y for f, y in zip(fields, x, strict=True)}
    return found


def _common_kind(arrays: dict[str, Any]) -> _Kind:
    kinds = {name: None if is_array(x) else _kind(name, x) for name, x in arrays.items()}
    first = next(kind for kind in kinds.values() if kind is not None)
    if any(kind != first for kind in kinds.values()):
        listed = ", ".join(f"{name} {_described(x, kinds[name])}" for name, x in arrays.items())
        raise TypeError(
            f"arrays of different libraries or devices in one call: {listed}. Nothing is copied between them; "
            "convert them to one kind first."
        )
    return first


def _kind(name: str, x: Any) -> _Kind:
    try:
        number, index = x.__dlpack_device__()
    except Exception as error:  # whatever an exporter's own refusal is
        raise _refused(name, x, error) from error
    if number not in _LIBRARIES:
        raise TypeError(
            f"{name} is a {_type_name(x)} in memory of DLPack's kind {int(number)}, neither a CPU's nor a CUDA "
            "device's. Move it to one of them."
        )
    library = _LIBRARIES[number]
    return _Kind(_namespace(name, x), library, 0 if library == "numpy" else int(index))


def _namespace(name: str, x: Any) -> Any:
    for base in type(x).__mro__:
        module = _NAMESPACES.get(base.__module__.partition(".")[0])
        if module is not None:
            return importlib.import_module(module)
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    raise TypeError(
        f"{name} is a {_type_name(x)}, whose library's from_dlpack is not known, so it cannot be answered in kind. "
        "Pass numpy.from_dlpack or cupy.from_dlpack of it."
    )


def _library(kind: _Kind) -> Any:
    try:
        return library_named(kind.library)
    except ImportError as error:
        raise ImportError(
            f"arrays of {kind.namespace.__name__} on CUDA device {kind.device} need {kind.library}, which is not "
            "installed. Install it (pip install cupy-cuda13x), or move the arrays to the CPU."
        ) from error


def _taken(name: str, x: Any, kind: _Kind, library: ModuleType) -> Any:
    if getattr(x, "requires_grad", False):
        raise TypeError(
            f"{name} is a {_type_name(x)} that requires a gradient, which would not be recorded: gradients come from "
            f"the function's own backward. Pass {name}.detach()."
        )
    # PyTorch exports the memory of such a view, without the sign.
    if hasattr(x, "is_neg") and x.is_neg():
        raise TypeError(f"{name} is a {_type_name(x)} whose negation is pending. Pass {name}.resolve_neg().")
    # NumPy takes no bfloat16 by DLPack, and CuPy 13 crashes on it: its bits travel as integers.
    half = str(getattr(x, "dtype", "")).endswith("bfloat16")
    if half and bfloat16 is None:
        raise TypeError(f"{name} is bfloat16, which NumPy lacks. Install ml_dtypes, or convert it to float32.")
    try:
        made = library.from_dlpack(x.view(kind.namespace.int16) if half else x)
    except Exception as error:  # BufferError, RuntimeError, TypeError: exporters differ
        raise _refused(name, x, error) from error
    return made.view(bfloat16) if half else made


def _given(x: Any, kind: _Kind) -> Any:
    if not is_array(x):
        return x
    if x.dtype.name == "bfloat16":
        return kind.namespace.from_dlpack(x.view(np.int16)).view(kind.namespace.bfloat16)
    return kind.namespace.from_dlpack(x)


def _refused(name: str, x: Any, error: Exception) -> TypeError:
    shape, dtype = tuple(getattr(x, "shape", ())), getattr(x, "dtype", "")
    reason = str(error).strip().rstrip(".").splitlines() or [type(error).__name__]
    return TypeError(
        f"{name} is a {_type_name(x)} {shape} {dtype} that its library does not export: {reason[0]}. "
        "Pass a plain dense array on the CPU or a CUDA device."
    )


def _type_name(x: Any) -> str:
    return f"{type(x).__module__.partition('.')[0]}.{type(x).__qualname__}"


def _described(x: Any, kind: _Kind | None) -> str:
    place = "" if kind is None else " on the CPU" if kind.library == "numpy" else f" on CUDA device {kind.device}"
    return f"{_type_name(x)}{place}"
