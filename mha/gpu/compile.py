"""CUDA C++ -> machine code with NVRTC, kept on disk under everything that went in.

Compiling needs no device and no CUDA headers: the sources include nothing but each other.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mha.optional import library_named

if TYPE_CHECKING:
    from mha.gpu.runtime import Source


#: NVRTC fails when two threads make it load its own libraries at the same time.
_lock = threading.Lock()


def first_line(error: Exception) -> str:
    """What an error says in its first line, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``MHA_CACHE_DIR``, or mha in the user's cache folder."""
    own = os.environ.get("MHA_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "mha"


def compiler() -> Any:
    """CuPy's binding of NVRTC.

    Raises
    ------
    RuntimeError
        If the library cannot be loaded.
    """
    try:
        nvrtc = library_named("cupy.cuda").nvrtc
        nvrtc.getVersion()
    except Exception as error:  # the loader's, of several kinds
        raise RuntimeError(
            f"NVRTC, which compiles the GPU kernels, cannot be loaded: {first_line(error)}. Install it: pip install "
            "nvidia-cuda-nvrtc (nvidia-cuda-nvrtc-cu12 for CUDA 12)."
        ) from None
    return nvrtc


def options(source: Source, capability: int) -> tuple[str, ...]:
    """NVRTC's."""
    return (
        f"-arch=sm_{capability}", "-std=c++17", "-default-device",
        *(f"-D{name}={value}" for name, value in source.defines),
    )  # fmt: skip


def compiled(source: Source, capability: int, *more: str) -> tuple[bytes, str]:
    """Machine code for a compute capability, and the compiler's remarks; `more` options are for tests.

    Raises
    ------
    RuntimeError
        With the compiler's messages.
    """
    nvrtc = compiler()
    files = dict(source.files)
    name = f"{source.stem}.cu"
    headers = [header for header in files if header != name]
    texts = tuple(files[header].encode() for header in headers)
    program = nvrtc.createProgram(files[name], name, texts, tuple(header.encode() for header in headers))
    try:
        nvrtc.compileProgram(program, (*options(source, capability), *more))
        # getCUBIN leaves out the last byte, which is zero.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(
            f"{name} does not compile for sm_{capability} with {dict(source.defines)}: {error}\n{log}\n"
            "Report this with the output of `python -m mha info`."
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def cubin(source: Source, capability: int) -> Path:
    """The file with the machine code, compiled unless it is there already."""
    nvrtc = compiler()
    key = hashlib.sha256(repr((nvrtc.getVersion(), options(source, capability), source)).encode()).hexdigest()
    folder = cache_folder()
    path = folder / f"{source.entry}_{key[:32]}.cubin"
    if path.exists():
        return path
    with _lock:
        code, _ = compiled(source, capability)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _written(code, folder, path)
    except OSError:
        # A read-only home: good for this process alone.
        return _written(code, Path(tempfile.gettempdir()), None)


def _written(code: bytes, folder: Path, path: Path | None) -> Path:
    """A file appears whole or not at all, whoever else writes the same."""
    handle, name = tempfile.mkstemp(suffix=".cubin", dir=folder)
    with os.fdopen(handle, "wb") as file:
        file.write(code)
    if path is None:
        return Path(name)
    os.replace(name, path)
    return path
