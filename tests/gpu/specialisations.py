"""What the plans choose for representative problems: the specialisations that the compile check looks at."""

from __future__ import annotations

from collections.abc import Iterator

from mha.gpu import plan
from mha.gpu.plan import KernelPlan
from mha.gpu.runtime import DeviceFacts
from mha.gpu.tiles import ANYTHING, NOTHING_HIDDEN, RANGES, Traits
from mha.problem import Sizes

#: Compute capability -> KiB of shared memory that a block of threads may have (CUDA C++ Programming Guide, table of
#: technical specifications).
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}

#: dtype -> number of `params.STORAGE`, bytes, bytes of the computing type.
STORED = {"float32": (0, 4, 4), "float64": (1, 8, 8), "float16": (2, 2, 4), "bfloat16": (3, 2, 4)}

Job = tuple[str, KernelPlan]


def device(capability: int) -> DeviceFacts:
    """Facts of a device of this compute capability."""
    return DeviceFacts(f"sm_{capability}", capability, 132, SHARED[capability] * 1024)


def traits(dtype: str, capability: int, masks: int, dropout: bool, aligned: bool, tf32: bool = False) -> Traits:
    """As `mha.gpu.launch.traits` makes them; a test compares the two."""
    storage, itemsize, real = STORED[dtype]
    by_tensor = {2: True, 4: tf32, 8: SHARED[capability] > 128}[itemsize]
    return Traits(storage, itemsize, real, capability >= 80 and by_tensor, masks, dropout, aligned)


def jobs(capability: int, full: bool) -> Iterator[Job]:
    """(dtype, plan) of every kernel: large problems, head sizes and masks as they are met; `full` takes every mix."""
    facts = device(capability)
    for dtype, (_, _, real) in STORED.items():
        if dtype == "bfloat16" and not full:
            continue  # float16's twin but for the conversions
        for tf32 in (False, True) if dtype == "float32" and capability >= 80 else (False,):
            for head_dim in (64, 128, 256) if full else (64,) if capability == 80 else (64, 128):
                if real == 8 and capability < 80 and head_dim > 128:
                    continue
                for masks in (NOTHING_HIDDEN, RANGES, ANYTHING):
                    for dropout in (False, True) if full else (masks == ANYTHING,):
                        chosen = traits(dtype, capability, masks, dropout, True, tf32)
                        for made in _plans(head_dim, chosen, facts, full):
                            yield dtype, made
        chosen = traits(dtype, capability, RANGES, False, False)
        for made in _plans(72, chosen, facts, full):
            yield dtype, made


def _plans(head_dim: int, chosen: Traits, facts: DeviceFacts, full: bool) -> Iterator[KernelPlan]:
    sizes = Sizes(2, 16, 16, 8192, 8192, head_dim, head_dim)
    target = (2, 16, 8192, 8192)
    yield from plan.plan_forward(sizes, chosen, facts)
    yield from plan.plan_forward(Sizes(2, 16, 2, 1, 8192, head_dim, head_dim), chosen, facts)
    yield from plan.plan_backward(sizes, chosen, facts)
    yield plan.plan_rows("attention_delta", sizes, chosen, facts)
    modes = range(5) if full else (plan.WEIGHTS, plan.MASK_GRADIENT, plan.ROW_SCALE)
    for mode in modes:
        yield plan.plan_weights(mode, target, sizes, chosen, facts)
    for features in (64, 4096):
        yield from plan.plan_residual_norm(8192, features, chosen.storage).kernels
        yield from plan.plan_residual_norm_backward(8192, features, chosen.storage).kernels
