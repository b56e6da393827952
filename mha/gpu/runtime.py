"""The one object through which the GPU backend reaches a device: memory, facts, compiling, launching.

CuPy's is here. Another library of arrays brings its own and registers it, as the tests do with one that runs the
kernels on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mha.gpu import compile
from mha.optional import library_named

Array = NDArray[Any]


@dataclass(frozen=True)
class DeviceFacts:
    """What plans depend on besides the problem."""

    name: str
    #: 90 for compute capability 9.0.
    capability: int
    multiprocessors: int
    #: Of shared memory that one block of threads may have.
    shared_bytes: int


class Source(NamedTuple):
    """Everything that goes into a compiled kernel besides the architecture."""

    #: The kernel's function in the file `stem`.cu.
    entry: str
    stem: str
    defines: tuple[tuple[str, int], ...]
    #: File name -> text, of the kernel and of every header.
    files: tuple[tuple[str, str], ...]


class Runtime(Protocol):
    """What a library of device arrays must offer."""

    @property
    def xp(self) -> ModuleType:
        """The library, with NumPy's functions."""

    def device(self) -> int:
        """Number of the current device."""

    def facts(self) -> DeviceFacts:
        """Of the current device."""

    def address(self, x: Array) -> int:
        """Of an array's first element, on the device."""

    def upload(self, x: NDArray[np.int64]) -> Array:
        """A NumPy array as one on the device."""

    def load(self, source: Source, shared: int) -> Any:
        """A kernel for the current device, which may have `shared` bytes of shared memory."""

    def launch(self, kernel: Any, grid: tuple[int, int], threads: int, shared: int, block: bytearray) -> None:
        """Run a kernel with the parameter block, on the current stream; nothing waits."""


#: The first release for NumPy 2.
_OLDEST_CUPY = 13
#: Turing's 7.5; NVRTC 13 compiles for nothing older.
_LEAST_CAPABILITY = 75


class _Cupy:
    """CuPy: its arrays, its current stream. RuntimeError for one that is too old."""

    def __init__(self) -> None:
        self.xp = library_named("cupy")
        version = self.xp.__version__
        if int(version.partition(".")[0]) < _OLDEST_CUPY:
            raise RuntimeError(
                f"CuPy {version} is older than {_OLDEST_CUPY}.0, which the GPU kernels need. Upgrade it."
            )
        self._facts: dict[int, DeviceFacts] = {}

    def device(self) -> int:
        """Number of the current device."""
        return int(self.xp.cuda.runtime.getDevice())

    def facts(self) -> DeviceFacts:
        """Of the current device.

        Raises
        ------
        RuntimeError
            If there is no device or driver, or the device is too old.
        """
        found = self.found()
        if found.capability < _LEAST_CAPABILITY:
            raise RuntimeError(
                f"{found.name} has compute capability {found.capability / 10}; the GPU kernels need "
                f"{_LEAST_CAPABILITY / 10} (Turing) or later. Use NumPy arrays on this machine."
            )
        return found

    def found(self) -> DeviceFacts:
        """Of the current device, even of one too old; RuntimeError as `facts` for the rest."""
        try:
            device = self.device()
            if device not in self._facts:
                self._facts[device] = self._read(device)
        except Exception as error:  # CuPy's own, of several kinds
            raise RuntimeError(self._why_no_device(error)) from None
        return self._facts[device]

    def _read(self, device: int) -> DeviceFacts:
        found = self.xp.cuda.runtime.getDeviceProperties(device)
        return DeviceFacts(
            found["name"].decode(), 10 * found["major"] + found["minor"], found["multiProcessorCount"],
            found["sharedMemPerBlockOptin"],
        )  # fmt: skip

    def _why_no_device(self, error: Exception) -> str:
        """One sentence in place of CuPy's error."""
        reason, driver = compile.first_line(error), self.driver()
        if driver == 0:
            reason = f"there is no NVIDIA driver ({reason})"
        elif driver is not None:
            reason += f"; the driver is for CUDA {cuda_version(driver)}"
        return (
            f"CuPy {self.xp.__version__} cannot use a GPU: {reason}. Install or update the NVIDIA driver, "
            "or use NumPy arrays."
        )

    def driver(self) -> int | None:
        """CUDA version of the driver, 12060 for 12.6; 0 without one, None if CuPy does not tell."""
        try:
            return int(self.xp.cuda.runtime.driverGetVersion())
        except Exception:
            return None

    def address(self, x: Array) -> int:
        """Of an array's first element."""
        return int(x.data.ptr)  # type: ignore[attr-defined]

    def upload(self, x: NDArray[np.int64]) -> Array:
        """A NumPy array as one of CuPy's."""
        return self.xp.asarray(x)

    def load(self, source: Source, shared: int) -> Any:
        """Compile, or take from the disk cache, and load."""
        path: Path = compile.cubin(source, self.facts().capability)
        kernel = self.xp.RawModule(path=str(path)).get_function(source.entry)
        if shared > 48 * 1024:
            kernel.max_dynamic_shared_size_bytes = shared
        # The function behind the RawKernel: a RawKernel looks up the device again in every call.
        return kernel.kernel

    def launch(self, kernel: Any, grid: tuple[int, int], threads: int, shared: int, block: bytearray) -> None:
        """Run a kernel on the current stream."""
        # CuPy passes a NumPy array of one element by value.
        kernel((*grid, 1), (threads, 1, 1), (np.frombuffer(block, f"V{len(block)}"),), shared)


def cuda_version(version: int) -> str:
    """12.6 for CUDA's 12060."""
    return f"{version // 1000}.{version % 1000 // 10}"


_runtimes: dict[str, Runtime] = {}


@cache
def cupy() -> _Cupy:
    """CuPy's runtime."""
    return _Cupy()


def register(library: ModuleType, runtime: Runtime) -> None:
    """Make `runtime` the one for arrays of `library`."""
    _runtimes[library.__name__] = runtime


def of(library: ModuleType) -> Runtime:
    """The runtime for arrays of a library."""
    return _runtimes.get(library.__name__) or cupy()
