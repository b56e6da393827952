"""The devices that the GPU tests run on: an emulated one wherever there is g++, a real one where there is a driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import emulator
import numpy as np


@dataclass(frozen=True)
class Device:
    """A library of device arrays, and the way there and back."""

    name: str
    library: Any

    @property
    def own_name(self) -> str:
        """As PyTorch names devices."""
        return "cpu" if self.library is np else "cuda"

    def put(self, x: Any) -> Any:
        """A NumPy array, or those among the values of a dict, on the device in the same strides; others as they are."""
        if isinstance(x, dict):
            return {name: self.put(value) for name, value in x.items()}
        if not isinstance(x, np.ndarray) or self.library is np:
            return x
        if 0 in x.shape:
            return self.library.asarray(x)
        # The memory that the array spans, then the same view of it.
        first = np.lib.stride_tricks.as_strided(x, (1,), (x.itemsize,))
        reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.strides, strict=True))
        assert all(stride >= 0 for stride in x.strides)
        memory = np.lib.stride_tricks.as_strided(first, (reach // x.itemsize + 1,), (x.itemsize,))
        return strided(self.library, self.library.asarray(memory.copy()), x.shape, x.strides)

    def get(self, x: Any) -> Any:
        """Back as NumPy arrays, those in tuples, lists and dicts included."""
        if self.library is np:
            return x
        if isinstance(x, dict):
            return {name: self.get(value) for name, value in x.items()}
        if isinstance(x, (tuple, list)):
            return type(x)(self.get(item) for item in x) if type(x) in (tuple, list) else type(x)(*map(self.get, x))
        return self.library.asnumpy(x) if isinstance(x, self.library.ndarray) else x


#: No device, but NumPy's arrays where they are.
HOST = Device("host", np)


def strided(library: Any, memory: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """A view of flat device memory."""
    if library is emulator.library:
        return emulator.Array(np.lib.stride_tricks.as_strided(memory.host, shape, strides))
    return library.lib.stride_tricks.as_strided(memory, shape, strides)


def why_no_gpu() -> str | None:
    """Why no CuPy device can be used; None if one can."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        cupy.zeros(1)
    except Exception as error:  # whatever the driver's absence gives
        return f"CuPy finds no device: {error}"
    return None


def available() -> dict[str, str | None]:
    """Device name -> why it cannot be used here, or None."""
    return {
        "emulated": None if emulator.compiler() else "g++, which compiles the emulated kernels, is not installed",
        "cupy": why_no_gpu(),
    }


def get(name: str) -> Device:
    """The device of this name, ready to be used."""
    if name == "emulated":
        emulator.install()
        return Device(name, emulator.library)
    import cupy

    return Device(name, cupy)
