"""Libraries that export DLPack, PyTorch and JAX where they are installed, and one of the tests' own."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from tolerance import DTYPES


class Tensor:
    """Exports what a NumPy array exports, wherever it says that it lies."""

    def __init__(self, host: Any, device: tuple[int, int] = (1, 0)) -> None:
        self.host, self.device = host, device
        self.shape, self.dtype = host.shape, host.dtype

    def __dlpack__(self, **options: Any) -> Any:
        return self.host.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __array_namespace__(self) -> Any:
        return NAMESPACE

    def view(self, dtype: Any) -> Tensor:
        return Tensor(self.host.view(dtype), self.device)


NAMESPACE = SimpleNamespace(
    __name__="own", from_dlpack=lambda x: Tensor(np.from_dlpack(x)), int16=np.int16, bfloat16=DTYPES.get("bfloat16")
)


@dataclass(frozen=True)
class Library:
    """A way from NumPy arrays and back that shares no code with the package's."""

    name: str
    kind: type
    #: Whether a view of another dtype is a copy.
    views_copy: bool = False

    def put(self, x: Any) -> Any:
        """A NumPy array as one of the library's; others as they are."""
        if not isinstance(x, np.ndarray):
            return x
        half = x.dtype.name == "bfloat16"
        if self.name == "own":
            return Tensor(x)
        if self.name == "torch":
            torch = importlib.import_module("torch")
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if half else torch.from_numpy(x)
        return importlib.import_module("jax.numpy").asarray(x)

    def get(self, x: Any) -> Any:
        """Back, the members of tuples included."""
        if isinstance(x, tuple):
            return tuple(map(self.get, x))
        if not isinstance(x, self.kind):
            return x
        if self.name == "own":
            return x.host
        if self.name == "torch" and str(x.dtype) == "torch.bfloat16":
            return x.view(importlib.import_module("torch").int16).numpy().view(DTYPES["bfloat16"])
        return np.asarray(x)

    def address(self, x: Any) -> int:
        """Of the first element."""
        if self.name == "own":
            return int(x.host.ctypes.data)
        return int(x.data_ptr() if self.name == "torch" else x.unsafe_buffer_pointer())


def find(name: str) -> Library | str:
    """The library, or why there is none."""
    if name == "own":
        return Library(name, Tensor)
    try:
        module = importlib.import_module(name)
    except ImportError:
        return f"{name} is not installed"
    return Library(name, module.Tensor) if name == "torch" else Library(name, module.Array, views_copy=True)
