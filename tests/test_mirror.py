"""CPU and GPU are twins: what a reader knows of one side holds on the other."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from mha import cpu, gpu, reference_backend

ROOT = Path(__file__).parents[1]
PYX = {path.stem for path in (ROOT / "pyx").iterdir() if path.suffix in (".pyx", ".pxd", ".h")}
CUDA = {path.stem for path in (ROOT / "cupy_kernels").iterdir() if path.suffix in (".cu", ".cuh")}

#: Stems of one side alone, and why.
CPU_ONLY = {
    "product": "projections on the GPU are cuBLAS's",
    "yardstick": "for the bench: the GPU's ceilings are measured with cuBLAS and copies",
    "runtime": "OpenMP and the processor's features",
    "schedule": "sharing work out among threads; on the GPU the hardware does it",
    "replay": "launches of a recorded call; the GPU has CUDA graphs",
    "vec": "vector arithmetic that CUDA C++ has",
    "pairs": "products of bfloat16 pairs; on the GPU tile_tensor's",
    "amx": "the same by the processor's matrix tiles",
    "amx_instructions": "one wrapper for each instruction of these; on the GPU in prim",
    "dots": "sums lane by lane and without hidden terms; on the GPU a matter of each kernel's threads",
    "stream": "products that ask for memory ahead; on the GPU other threads compute meanwhile",
    "half": "conversions that are instructions on the GPU, in prim",
}
GPU_ONLY = {
    "prim": "one wrapper for each instruction without a word in CUDA C++",
    "query_rows": "what the kernels share whose rows are queries; on the CPU it is in attention_backward_query",
    "tile_plain": "tile.cuh by multiplications and additions",
    "tile_tensor": "tile.cuh by matrix instructions",
}

#: Concept -> functions that both sides have.
FUNCTIONS = {
    "mask": ["visible_keys", "key_exists", "fill_panel", "next_block", "mask_scores", "drop_scores"],
    "online_softmax": ["softmax_absorb", "softmax_replay", "softmax_gradient"],
    "key_panel": ["key_panels", "fill_key_panel", "any_visible", "mask_query_scores"],
    "storage": ["load_one", "store_one"],
    "philox": ["philox"],
    "attention_forward": ["attention_forward", "store_statistics"],
    "attention_backward": ["attention_backward"],
    "attention_backward_query": ["attention_backward_query", "score_gradients"],
    "attention_delta": ["attention_delta"],
    "attention_weights": ["attention_weights", "weights_tile"],
    "attention_decode": ["attention_decode", "partial_size"],
    "residual_norm": ["residual_norm", "residual_norm_backward", "drop_row"],
    "norm": ["normalise_row"],
}


def test_every_concept_is_on_both_sides() -> None:
    assert set(CPU_ONLY) == PYX - CUDA, "a file of pyx/ without a twin and without a reason"
    assert set(GPU_ONLY) == CUDA - PYX, "a file of cupy_kernels/ without a twin and without a reason"


@pytest.mark.parametrize(("concept", "name"), [(c, n) for c, names in FUNCTIONS.items() for n in names])
def test_functions_carry_the_same_names(concept: str, name: str) -> None:
    for folder in ("pyx", "cupy_kernels"):
        texts = [
            path.read_text()
            for path in (ROOT / folder).iterdir()
            if path.suffix in (".pyx", ".pxd", ".h", ".cu", ".cuh")
        ]
        assert any(re.search(rf"\b(?:MHA_NAME\()?(?:mha_)?{name}\)?\(", text) for text in texts), (
            folder,
            concept,
            name,
        )


PUBLIC = ["attention_forward", "attention_weights", "attention_backward", "product", "pack", "residual_norm",
          "residual_norm_backward", "unsupported_reasons"]  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("other", [gpu, reference_backend], ids=["gpu", "reference"])
def test_backends_have_the_same_functions(name: str, other: object) -> None:
    ours, theirs = (inspect.signature(getattr(backend, name)) for backend in (cpu, other))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


def test_a_fault_is_planted_in_every_kernel() -> None:
    kernels = {path.stem for path in (ROOT / "cupy_kernels").glob("*.cu")}
    faults = "".join(path.read_text() for path in (ROOT / "tests" / "gpu").glob("test_*faults.py"))
    assert {kernel for kernel in kernels if f'"{kernel}.cu"' not in faults} == set(), "no fault is planted in these"


def test_plans_carry_the_same_names() -> None:
    from mha.cpu import plan as on_cpu
    from mha.gpu import plan as on_gpu

    names = {name for name in vars(on_cpu) if name.startswith("plan_")} - {"plan_product"}
    assert names <= {name for name in vars(on_gpu) if name.startswith("plan_")}
