"""The kernels on the emulated device under the address and thread sanitizers: silent, and not silent about a fault.

The thread sanitizer takes every CUDA thread for a thread of its own, so a missing barrier is a race whatever came out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import emulator
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

if emulator.compiler() is None:
    pytest.skip("g++, which compiles the emulated kernels, is not installed", allow_module_level=True)

LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
#: What a report begins with.
REPORT = {"address": "ERROR: AddressSanitizer", "thread": "WARNING: ThreadSanitizer"}


@cache
def library(flavour: str) -> str | None:
    """The sanitizer's run-time library; None where the compiler has none."""
    name = LIBRARIES[flavour]
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if path != name else None


def run(flavour: str, *arguments: str) -> str:
    """What the program prints, the sanitizer's report included."""
    preloaded = library(flavour)
    if preloaded is None:
        pytest.skip(f"the compiler has no {LIBRARIES[flavour]}")
    paths = [ROOT, ROOT / "tests", ROOT / "tests" / "gpu", ROOT / "tests" / "kernels"]
    environment = os.environ | {
        "LD_PRELOAD": preloaded,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "report_signal_unsafe=0 exitcode=66",
    }
    command = [sys.executable, str(HERE / "sanitized.py"), flavour, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr


MORE = ["size_97x200", "causal_97x200", "option_dropout", "decode_masked", "mask_float_inf", "dims_128_40",
        "dims_256_256", "lengths", "grouped_6_1", "layout_sliced"]  # fmt: skip
CASES = [pytest.param(name, dtype, marks=pytest.mark.slow) for name in MORE
         for dtype in ("float32", "float16", "float64")[: 3 if name == "size_97x200" else 2]]  # fmt: skip
CASES.insert(0, ("everything", "float16"))


@pytest.mark.parametrize("flavour", LIBRARIES)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_silent(flavour: str, name: str, dtype: str) -> None:
    said = run(flavour, name, dtype)
    assert REPORT[flavour] not in said, said[:3000]
    assert said.splitlines()[-1:] == ["right"], said[:3000]


class Fault(NamedTuple):
    """What is replaced in a source, and the case that comes by it."""

    flavour: str
    case: str
    dtype: str
    file: str
    text: str
    replacement: str


DRAWS = "        draws[i] = (unsigned char)keep_bits(words, (uint32)p.threshold);\n    }\n"
FAULTS = [
    Fault(
        "address", "everything", "float16", "attention_forward.cu", "THREADS>(value, KEYS,", "THREADS>(value, 2 * KEYS,"
    ),
    Fault("thread", "everything", "float16", "mask.cuh", f"{DRAWS}    __syncwarp();", DRAWS),
    Fault("address", "dims_17_33", "float32", "storage.cuh", "if (from >= 0 && c < columns)", "if (true)"),
    Fault(
        "thread", "size_97x200", "float32", "attention_forward.cu", "__syncthreads(); // everyone's values", "// values"
    ),
    Fault(
        "thread", "size_97x200", "float32", "attention_backward.cu", "__syncthreads(); // everyone is done", "// done"
    ),
    Fault(
        "thread", "size_97x200", "float32", "attention_backward_query.cu", "__syncthreads(); // everyone is done", "//"
    ),
]


@pytest.mark.parametrize(
    "fault", [FAULTS[0], FAULTS[1], *(pytest.param(f, marks=pytest.mark.slow) for f in FAULTS[2:])]
)
def test_a_fault_is_reported(fault: Fault) -> None:
    assert fault.text in (ROOT / "cupy_kernels" / fault.file).read_text()
    said = run(fault.flavour, fault.case, fault.dtype, fault.file, fault.text, fault.replacement)
    assert REPORT[fault.flavour] in said, said[:3000]


def test_a_wait_too_weak_gives_nan(emulated: emulator.runtime.Emulated) -> None:
    """An asynchronous copy lands only at the wait that covers it: no sanitizer is needed."""
    import devices
    import numpy as np
    from problems import on_device

    from mha import gpu

    problem = on_device("size_97x200", "float16", devices.get("emulated"))[0]
    assert np.isfinite(gpu.attention_forward(problem)[0].host).all()
    emulated.faults = [("copy_async_wait<0>(); // the keys, and at first the queries", "copy_async_wait<1>();")]
    assert np.isnan(gpu.attention_forward(problem)[0].host).any()
