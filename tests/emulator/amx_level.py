"""The level "amx" on processors without matrix tiles: its kernels built with tiles in memory."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FLAGS = (
    "-std=gnu11 -O2 -shared -fPIC -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-unused-function"
)
LEVEL = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512cd"


def why_not() -> str | None:
    """Why this machine cannot build or run it; None if it can."""
    from mha.cpu import load

    if not {"avx512", "avx512bf16"} & set(load.runnable_levels()):
        return "this processor has no AVX-512, which the kernels with emulated matrix tiles need"
    if importlib.util.find_spec("Cython") is None or shutil.which("gcc") is None:
        return "the kernels with emulated matrix tiles are built by Cython and gcc"
    return None


@cache
def kernels() -> ModuleType:
    """The kernels, compiled when anything that went in has changed."""
    name = "_kernels_amx_emulated"
    sources = [*sorted((ROOT / "pyx").iterdir()), HERE / "amx" / "amx_instructions.h", Path(__file__)]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = ROOT / "build" / "emulator" / f"amx_{key}_{sys.implementation.cache_tag}"
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        stub = folder / f"{name}.pyx"
        kernels = (path.name for path in sources if path.suffix == ".pyx" and path.stem not in ("runtime", "replay"))
        includes = "".join(f'include "{kernel}"\n' for kernel in kernels)
        stub.write_text(
            "from tile cimport MHA_TILE_VECTORS, MHA_VECTOR_BYTES\n"
            "VECTOR_BYTES, TILE_VECTORS, PAIRED = MHA_VECTOR_BYTES, MHA_TILE_VECTORS, True\n" + includes
        )
        directives = ("boundscheck=False", "wraparound=False", "cdivision=True", "initializedcheck=False")
        cython = [sys.executable, "-m", "cython", "-3", "-X", ",".join(directives), "-I", str(ROOT / "pyx"), str(stub)]
        subprocess.run(cython, check=True, cwd=ROOT)
        include = ["-I", str(HERE / "amx"), "-I", str(ROOT / "pyx"), "-I", sysconfig.get_paths()["include"]]
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [
                "gcc",
                *FLAGS.split(),
                *LEVEL.split(),
                "-DMHA_AMX",
                *include,
                str(stub.with_suffix(".c")),
                "-o",
                str(partial),
            ],
            check=True,
        )
        partial.rename(library)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
