"""Builds the CPU kernels: one extension module per instruction-set level, all from the sources in `pyx/`.

All metadata is in pyproject.toml. `MHA_BUILD_LEVELS=avx2,baseline` limits the levels; `MHA_DEBUG=1` builds with
bounds checks and symbols.
"""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEBUG = os.environ.get("MHA_DEBUG", "0") == "1"

# level -> compiler flags; the level names are those of mha.cpu.load
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mprefer-vector-width=512"]
X86_LEVELS = {
    "baseline": [],
    "avx2": [*AVX2, "-mtune=haswell"],
    "avx512": [*AVX2, *AVX512, "-mtune=skylake-avx512"],
    "avx512bf16": [*AVX2, *AVX512, "-mavx512bf16", "-mtune=skylake-avx512"],
    "amx": [*AVX2, *AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mtune=skylake-avx512"],
}
LEVELS = X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}

# Comparisons must vectorise (no errno, no traps); sums keep their order, so no flag that reassociates.
FLAGS = ["-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-unused-function"]
FLAGS += ["-O1", "-g"] if DEBUG else ["-O3", "-g0"]

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "freethreading_compatible": True,
}

KERNELS = [
    "attention_forward",
    "attention_backward",
    "attention_backward_query",
    "attention_delta",
    "attention_weights",
    "attention_decode",
    "product",
    "residual_norm",
    "yardstick",
]


class BuildKernels(build_ext):
    """Adds OpenMP where the compiler has it; without it the same sources make a serial build. A level whose flags an
    older compiler does not know is left out."""

    def build_extensions(self) -> None:
        newest = '__asm__("tdpbf16ps %tmm0, %tmm1, %tmm2");'  # the assembler must know it too
        nothing = f"int main(void) {{\n#ifdef __AMX_BF16__\n{newest}\n#endif\nreturn 0; }}\n"
        known = [x for x in self.extensions if self._compiles(x.extra_compile_args, nothing)]
        for extension in self.extensions:
            if extension not in known:
                self.warn(
                    f"{extension.name} is left out: the compiler refuses {' '.join(extension.extra_compile_args)}"
                )
        self.extensions = known or self.extensions
        program = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
        flags = ["-fopenmp"] if self._compiles(["-fopenmp"], program) else []
        for extension in self.extensions:
            extension.extra_compile_args += flags
            extension.extra_link_args += flags
        super().build_extensions()

    def _compiles(self, flags: list[str], source: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.c"
            path.write_text(source)
            try:
                objects = self.compiler.compile([str(path)], output_dir=folder, extra_postargs=flags)
                self.compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=flags)
            except Exception:  # whatever the compiler's class calls its failure
                return False
        return True


class BuildPackages(build_py):
    """Puts the CUDA sources, which are compiled at run time, into the package; a checkout finds them beside it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "mha" / "cupy_kernels"
            target.mkdir(parents=True, exist_ok=True)
            for path in (ROOT / "cupy_kernels").iterdir():
                if path.suffix in (".cu", ".cuh", ".py"):
                    self.copy_file(str(path), str(target / path.name))


def kernel_extension(level: str, flags: list[str]) -> Extension:
    """The module of one level: a stub, written into the build folder, that includes every kernel."""
    stub = ROOT / "build" / "stubs" / f"_kernels_{level}.pyx"
    text = f'"""CPU kernels compiled for the level {level}."""\n'
    text += "from tile cimport MHA_PAIRED, MHA_TILE_VECTORS, MHA_VECTOR_BYTES\n\n"
    text += "VECTOR_BYTES, TILE_VECTORS, PAIRED = MHA_VECTOR_BYTES, MHA_TILE_VECTORS, MHA_PAIRED\n\n"
    text += "".join(f'include "{name}.pyx"\n' for name in KERNELS)
    stub.parent.mkdir(parents=True, exist_ok=True)
    if not stub.exists() or stub.read_text() != text:
        stub.write_text(text)
    return _extension(f"mha.cpu._kernels_{level}", stub, flags)


def _extension(name: str, source: Path, flags: list[str]) -> Extension:
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "pyx").glob("*.h"))
    return Extension(
        name,
        [str(source.relative_to(ROOT))],
        include_dirs=["pyx"],
        depends=headers,
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=[],
    )


os.chdir(ROOT)
wanted = os.environ.get("MHA_BUILD_LEVELS", ",".join(LEVELS)).split(",")
extensions = [kernel_extension(level, LEVELS[level]) for level in wanted]
extensions += [_extension(f"mha.cpu._{name}", ROOT / "pyx" / f"{name}.pyx", []) for name in ("runtime", "replay")]
setup(
    ext_modules=cythonize(extensions, include_path=["pyx"], compiler_directives=DIRECTIVES, build_dir="build/cython"),
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPackages},
)
