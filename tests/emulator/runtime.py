"""The runtime of the emulated device: g++ instead of NVRTC, fibres instead of a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from emulator import arrays
from mha.gpu.runtime import DeviceFacts, Source

HERE = Path(__file__).parent

#: Compilers' flags by flavour. Without OpenMP under the thread sanitizer, which does not know libgomp's barriers.
FLAGS = {
    "plain": ["-O1", "-fopenmp"],
    "address": ["-O1", "-g", "-fsanitize=address"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}
_ALWAYS = ["-std=c++17", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-w"]


@cache
def compiler() -> str | None:
    """g++, or None with a reason to skip."""
    return shutil.which("g++")


def _folder() -> Path:
    """Where the compiled kernels are kept."""
    own = os.environ.get("MHA_EMULATOR_CACHE")
    folder = Path(own) if own else HERE.parents[1] / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _build(texts: dict[str, str], main: str, flags: list[str]) -> Path:
    """A shared object of the file `main`, with the others as its includes; kept under everything that went in."""
    key = hashlib.sha256(repr((sorted(texts.items()), main, flags)).encode()).hexdigest()[:32]
    path = _folder() / f"{Path(main).stem}_{key}.so"
    if path.exists():
        return path
    folder = path.with_suffix(f".{os.getpid()}")
    folder.mkdir(exist_ok=True)
    try:
        for name, text in texts.items():
            (folder / name).write_text(text)
        program = compiler()
        assert program is not None, "g++ is not installed"
        command = [program, *_ALWAYS, *flags, "-x", "c++", main, "-o", "out.so"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")
        os.replace(folder / "out.so", path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


class Emulated:
    """A device with the facts of some GPU, which runs on the CPU.

    `flavour` is one of FLAGS; `seed` shuffles the threads.
    """

    xp = arrays.library

    def __init__(self, flavour: str = "plain") -> None:
        self.flavour = flavour
        self.seed = 0
        self.device_facts = DeviceFacts("emulated", 90, 132, 227 * 1024)
        #: (text, replacement) pairs, applied to the sources: planted faults.
        self.faults: list[tuple[str, str]] = []
        #: Names of the kernels launched.
        self.launched: list[str] = []

    def device(self) -> int:
        """A number for what is compiled differently."""
        return hash((self.device_facts, tuple(self.faults)))

    def facts(self) -> DeviceFacts:
        """Of the GPU it plays."""
        return self.device_facts

    def address(self, x: Any) -> int:
        """In the memory of the CPU."""
        return int(x.host.ctypes.data)

    def upload(self, x: Any) -> Any:
        """To the device."""
        return arrays.asarray(x)

    def load(self, source: Source, shared: int) -> Any:
        """Compile with the emulator's own prim.cuh in place of the product's."""
        assert shared <= self.device_facts.shared_bytes
        texts = dict(source.files)
        for text, replacement in self.faults:
            places = [name for name in texts if text in texts[name]]
            for name in places:
                texts[name] = texts[name].replace(text, replacement)
        texts |= {name: (HERE / name).read_text() for name in ("prim.cuh", "cuda.h")}
        defines = "".join(f"#define {name} {value}\n" for name, value in source.defines)
        texts["kernel.cpp"] = (
            f'{defines}#include "{source.stem}.cu"\n'
            "template <class Params> void call(void (*kernel)(Params), const void *params)\n"
            "{\n    kernel(*(const Params *)params);\n}\n"
            f'extern "C" void run(const void *params) {{ call({source.entry}, params); }}\n'
            "template <class Params> size_t size_of(void (*)(Params))\n{\n    return sizeof(Params);\n}\n"
            f'extern "C" size_t params_size() {{ return size_of({source.entry}); }}\n'
        )
        _launcher(self.flavour)  # its symbols are the kernels'
        library = ctypes.CDLL(str(_build(texts, "kernel.cpp", FLAGS[self.flavour])))
        library.params_size.restype = ctypes.c_size_t
        return source.entry, library

    def launch(self, kernel: Any, grid: tuple[int, int], threads: int, shared: int, block: bytearray) -> None:
        """Run at once, to the end."""
        name, library = kernel
        assert len(block) == library.params_size(), (name, len(block), library.params_size())
        self.launched.append(name)
        sizes = (ctypes.c_uint * 3)(*grid, 1)
        params = (ctypes.c_char * len(block)).from_buffer(block)
        _launcher(self.flavour)(
            ctypes.cast(library.run, ctypes.c_void_p), params, sizes, ctypes.c_uint(threads), ctypes.c_size_t(shared),
            ctypes.c_uint(self.seed),
        )  # fmt: skip


@cache
def _launcher(flavour: str) -> Any:
    texts = {name: (HERE / name).read_text() for name in ("cuda.h", "fibres.cpp")}
    path = _build(texts, "fibres.cpp", FLAGS[flavour])
    function = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL).emulator_launch
    function.restype = None
    return function
