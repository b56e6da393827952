"""The compile check: every specialisation that the plans choose becomes machine code, without a device.

No register is spilled, none is used beyond the limit, shared memory fits, and the code holds the instructions that each
family is there for.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import devices
import numpy as np
import pytest
import specialisations
import test_conformance
from problems import on_device

from mha.gpu import compile, launch, load, plan
from mha.gpu.plan import KernelPlan
from mha.gpu.tiles import Tiles, fitting

#: A thread's registers.
REGISTERS = 255


def _missing() -> str | None:
    """Why nothing can be compiled here."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: run `make test-gpu-compile`"
    try:
        compile.compiler().getVersion()
    except Exception as error:  # whatever CuPy says of a missing NVRTC
        return f"NVRTC is not installed: run `make test-gpu-compile` ({error})"
    return None


MISSING = _missing()
if MISSING:
    pytest.skip(MISSING, allow_module_level=True)


class Compiled(NamedTuple):
    """What the assembler says of one specialisation."""

    dtype: str
    plan: KernelPlan
    stack: int
    spilled: int
    registers: int
    warnings: tuple[str, ...]
    code: bytes


def compiled(job: tuple[int, str, KernelPlan]) -> Compiled:
    """Compile one and read the assembler's remarks on its entry function."""
    capability, dtype, made = job
    code, log = compile.compiled(load.source(made), capability, "-Xptxas", "-v")
    own = log[log.index(f"'{made.kernel}'") :]
    stack, stores, loads = map(int, re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", own).groups())  # type: ignore[union-attr]  # fmt: skip
    registers = int(re.search(r"Used (\d+) registers", own)[1])  # type: ignore[index]
    warnings = tuple(line for line in log.splitlines() if "warning" in line.lower())
    return Compiled(dtype, made, stack, stores + loads, registers, warnings, code)


def everything(capability: int, full: bool) -> list[Compiled]:
    """Each specialisation once."""
    once = {(made.kernel, made.defines): (capability, dtype, made)
            for dtype, made in specialisations.jobs(capability, full)}  # fmt: skip
    # In processes: NVRTC takes one thread at a time.
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return list(pool.map(compiled, once.values(), chunksize=4))


def faults(found: Compiled, capability: int) -> list[str]:
    """What is wrong with a specialisation."""
    wrong = []
    # float64 by plain arithmetic is for devices with a 64th of the rate: there it has to be right, not fast.
    plain = found.dtype == "float64" and not dict(found.plan.defines).get("MHA_TENSOR")
    if (found.spilled or found.stack) and not plain:
        wrong.append(f"{found.spilled} bytes spilled, a stack frame of {found.stack}")
    if found.registers > REGISTERS:
        wrong.append(f"{found.registers} registers")
    if found.plan.shared > specialisations.SHARED[capability] * 1024:
        wrong.append(f"{found.plan.shared} bytes of shared memory")
    wrong += found.warnings
    return [f"{found.plan.kernel} {found.dtype} {dict(found.plan.defines)}: {fault}" for fault in wrong]


CAPABILITIES = [pytest.param((c, False), id=f"sm_{c}") for c in (80, 90)]
CAPABILITIES += [
    pytest.param((c, c in (80, 90)), id=f"sm_{c}_slow", marks=pytest.mark.slow) for c in specialisations.SHARED
]


@pytest.fixture(scope="module", params=CAPABILITIES)
def built(request: pytest.FixtureRequest) -> Iterator[tuple[int, list[Compiled]]]:
    """A capability and all that is compiled for it."""
    capability, full = request.param
    return capability, everything(capability, full)


def test_nothing_is_spilled(built: tuple[int, list[Compiled]]) -> None:
    capability, found = built
    wrong = [fault for one in found for fault in faults(one, capability)]
    assert not wrong, "\n".join(wrong)
    kernels = {one.plan.kernel for one in found}
    assert kernels == {name for stem in load.folder().glob("*.cu") for name in entries(stem)}, (
        "a kernel is not looked at"
    )


def entries(path: Path) -> list[str]:
    """The kernels of a file."""
    return re.findall(r"^KERNEL\([^)]*\)\s*(\w+)\(", path.read_text(), re.MULTILINE)


#: (dtype, tf32) -> instructions that the products must and must not be made of, from compute capability 8.0 on.
INSTRUCTIONS = {
    ("float16", False): ({"HMMA", "LDSM", "LDGSTS"}, {"DMMA"}),
    ("bfloat16", False): ({"HMMA", "LDSM", "LDGSTS"}, {"DMMA"}),
    ("float64", False): ({"DMMA", "LDGSTS"}, {"HMMA"}),
    ("float32", False): ({"FFMA", "LDGSTS"}, {"HMMA", "DMMA"}),
    ("float32", True): ({"HMMA", "LDSM", "LDGSTS"}, {"DMMA"}),
}
PRODUCTS = {"attention_forward", "attention_decode", "attention_backward", "attention_backward_query"}


def test_the_products_are_made_of_the_right_instructions(built: tuple[int, list[Compiled]], tmp_path: Path) -> None:
    tool = disassembler()
    capability, found = built
    looked_at = set()
    for one in found:
        defines = dict(one.plan.defines)
        key = one.dtype, one.dtype == "float32" and bool(defines.get("MHA_TENSOR"))
        small = defines.get("MHA_HEAD_DIM") == 64 and defines["MHA_ALIGNED"]
        if one.plan.kernel not in PRODUCTS or not small or (one.plan.kernel, key) in looked_at:
            continue
        looked_at.add((one.plan.kernel, key))
        path = tmp_path / "kernel.cubin"
        path.write_bytes(one.code)
        text = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
        present = set(re.findall(r"\b([A-Z][A-Z0-9]+)\b", text))
        if capability < 80:
            assert not present & {"HMMA", "DMMA"}, (one.plan.kernel, key)
            continue
        wanted, unwanted = INSTRUCTIONS[key]
        if key == ("float64", False) and not defines["MHA_TENSOR"]:
            wanted, unwanted = {"DFMA", "LDGSTS"}, {"DMMA", "HMMA"}  # little shared memory: consumer parts
        assert wanted <= present, (one.plan.kernel, key, wanted - present)
        assert not unwanted & present, (one.plan.kernel, key, unwanted & present)
    assert {kernel for kernel, _ in looked_at} == PRODUCTS


def disassembler() -> str:
    """nvdisasm of the package nvidia-cuda-nvdisasm."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).rglob("bin/nvdisasm"):
            return str(path)
    pytest.skip("nvidia-cuda-nvdisasm is not installed: run `make test-gpu-compile`")


def test_a_tile_too_large_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check fails where registers do not suffice."""
    facts = specialisations.device(90)
    chosen = specialisations.traits("float16", 90, 1, False, True)
    tiles = fitting("attention_forward", Tiles(2, 4, 128, 128, 128, 128, 128), 8192, 8192, chosen, facts.shared_bytes)
    greedy = plan._plan("attention_forward", tiles, chosen, 64, 1, "")
    assert any("spilled" in fault for fault in faults(compiled((90, "float16", greedy)), 90))


@pytest.mark.parametrize("case", test_conformance.CASES)
def test_the_conformance_kernels_compile(case: str) -> None:
    compile.compiled(test_conformance.source(case), 90)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_traits_are_those_of_the_launch(dtype: str) -> None:
    problem = on_device("size_64x64", dtype, devices.get("emulated"))[0]
    from mha.gpu import runtime

    found = launch.traits(problem, runtime.of(problem.xp))
    assert found == specialisations.traits(dtype, 90, 0, False, True)
    assert np.dtype(dtype).itemsize == found.itemsize


def test_every_plan_is_looked_at() -> None:
    source = Path(specialisations.__file__).read_text()
    functions = {name for name in vars(plan) if name.startswith("plan_")}
    assert all(f"plan.{name}(" in source for name in functions), functions
