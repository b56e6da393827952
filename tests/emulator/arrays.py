"""Arrays of the emulated device, and the library they belong to.

As with CuPy, they never mix with NumPy's by accident: an operation that meets a NumPy array is a TypeError.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np


class Array:
    """A NumPy array behind a wall."""

    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None

    def __init__(self, host: Any) -> None:
        assert isinstance(host, np.ndarray)
        self.host = host

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("implicit conversion to a NumPy array is not allowed. Use asnumpy.")

    def __getattr__(self, name: str) -> Any:
        if name not in _SAME:
            raise AttributeError(name)
        return getattr(self.host, name)

    def __getitem__(self, index: Any) -> Array:
        return wrapped(self.host[unwrapped(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.host[unwrapped(index)] = unwrapped(value)

    def __len__(self) -> int:
        return len(self.host)

    def __bool__(self) -> bool:
        return bool(self.host)

    def __int__(self) -> int:
        return int(self.host)

    def __float__(self) -> float:
        return float(self.host)

    def __repr__(self) -> str:
        return f"emulated {self.host!r}"

    @property
    def T(self) -> Array:
        """Transposed."""
        return wrapped(self.host.T)


#: Plain facts about an array.
_SAME = frozenset({"shape", "dtype", "ndim", "size", "itemsize", "nbytes", "strides", "flags", "tolist"})


#: What NumPy's arrays do, between arrays of the device alone.
_METHODS = """reshape swapaxes transpose astype sum mean max min any all copy ravel squeeze view cumsum prod round clip
    __add__ __sub__ __mul__ __truediv__ __floordiv__ __mod__ __pow__ __matmul__ __and__ __or__ __xor__ __lshift__
    __rshift__ __radd__ __rsub__ __rmul__ __rtruediv__ __rfloordiv__ __rmod__ __rpow__ __rand__ __ror__ __rxor__
    __iadd__ __isub__ __imul__ __itruediv__ __ior__ __iand__ __lt__ __le__ __gt__ __ge__ __eq__ __ne__ __neg__
    __invert__ __abs__"""


def _method(name: str) -> Any:
    def method(self: Array, *args: Any, **options: Any) -> Any:
        return wrapped(getattr(self.host, name)(*unwrapped(args), **unwrapped(options)))

    return method


for _name in _METHODS.split():
    setattr(Array, _name, _method(_name))


def wrapped(x: Any) -> Any:
    """Arrays behind the wall; scalars of an operation become arrays without axes, as CuPy has it."""
    if isinstance(x, (np.ndarray, np.generic)):
        return Array(np.asarray(x))
    if isinstance(x, (tuple, list)):
        return type(x)(wrapped(item) for item in x)
    return x


def unwrapped(x: Any) -> Any:
    """The NumPy arrays of a call's arguments; one that is none of ours is a TypeError."""
    if isinstance(x, Array):
        return x.host
    if isinstance(x, np.ndarray):
        raise TypeError(f"unsupported type {type(x)}: a NumPy array meets one of the device")
    if isinstance(x, (tuple, list)):
        return type(x)(unwrapped(item) for item in x)
    if isinstance(x, dict):
        return {name: unwrapped(item) for name, item in x.items()}
    return x


def asarray(x: Any, dtype: Any = None) -> Array:
    """To the device; always a copy, with the strides of a contiguous array."""
    return x if isinstance(x, Array) else Array(np.array(x, dtype, order="C"))


def asnumpy(x: Any) -> Any:
    """Back from the device."""
    return x.host.copy() if isinstance(x, Array) else x


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """Half precision is summed in float32 and rounded once, as cuBLAS does it."""
    dtype = np.result_type(a.dtype, b.dtype)
    wide = np.float32 if dtype.itemsize == 2 else dtype
    made = (unwrapped(a).astype(wide) @ unwrapped(b).astype(wide)).astype(dtype)
    if out is None:
        return Array(made)
    assert out.dtype == dtype, (out.dtype, dtype)
    out[...] = Array(made)
    return out


class _Library(ModuleType):
    """NumPy's functions on the arrays here."""

    ndarray = Array
    asarray = staticmethod(asarray)
    array = staticmethod(asarray)
    asnumpy = staticmethod(asnumpy)
    matmul = staticmethod(matmul)

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found):
            return found

        def function(*args: Any, **options: Any) -> Any:
            return wrapped(found(*unwrapped(args), **unwrapped(options)))

        return function


library = _Library("emulated")
sys.modules.setdefault("emulated", library)
