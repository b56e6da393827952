"""What the CPU backend has and would do, without doing it: for `show_config` and `explain`."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from mha.cpu import launch, load
from mha.cpu.plan import AttentionPlan, plan_backward, plan_forward, plan_rows
from mha.explanation import Explanation, KernelUse, Pass, described
from mha.problem import AttentionProblem


def check(library: ModuleType) -> None:
    """Raise if arrays of the library cannot be computed on here. NumPy's always can."""


def config() -> dict[str, Any]:
    """Every kernel: the instruction-set levels it is built for, those that run here, the chosen one, why not others."""
    built, runnable, chosen = list(load.built_levels()), list(load.runnable_levels()), load.chosen_level()
    reasons = {}
    for level in load.LEVELS:
        if level not in built:
            reasons[level] = "not built in this installation"
        elif level not in runnable:
            reasons[level] = "this processor or operating system does not run it"
        elif level != chosen:
            reasons[level] = f"{chosen} is faster" if chosen == runnable[0] else f"MHA_CPU_ISA is {chosen}"
    module = load.kernels(chosen)
    names = sorted(name.removesuffix("_scratch") for name in vars(module) if name.endswith("_scratch"))
    entry = {"built": built, "runnable": runnable, "chosen": chosen, "why not": reasons}
    return {"kernels": {name: dict(entry) for name in names}}


def explain(problem: AttentionProblem) -> Explanation:
    """The kernels that would run, from the plans that `attention_forward` and `attention_backward` follow."""
    p, facts = problem, launch.facts(problem.dtype)
    block = launch.attention(p, facts.kernels)
    row_bytes = p.batch * p.heads * p.queries * p.computing.itemsize
    forward, partials = [], 0
    if row_bytes:
        plan = plan_forward(p.sizes, facts)
        forward.append(_use(block, plan))
        if plan.kernel == "attention_decode":
            partials = facts.kernels.attention_decode_partials(block.packed(), block.double)
    backward = []
    if p.batch * p.heads:
        passes = plan_rows("attention_weights", p.sizes, facts)
        backward.append(_use(block, passes, "if a log-sum-exp is beyond 32"))
        plans = [plan_rows("attention_delta", p.sizes, facts), *plan_backward(p.sizes, facts)]
        backward += [_use(block, plan) for plan in plans]
    lanes = f"{facts.lanes} {p.computing} lanes"
    size = p.dtype.itemsize * p.batch
    return Explanation(
        "cpu", f"{load.chosen_level()}, {lanes}, at most {facts.threads} threads", described(p),
        Pass(tuple(forward), size * p.heads * p.queries * p.v_head_dim + row_bytes,
             2 * row_bytes + partials + max([use.memory for use in forward], default=0)),
        Pass(tuple(backward), size * sum(math.prod(x.shape[-3:]) for x in (p.query, p.key, p.value)),
             2 * row_bytes + max([use.memory for use in backward], default=0)),
    )  # fmt: skip


def _use(block: launch.Launch, plan: AttentionPlan, when: str = "") -> KernelUse:
    launch.follow(block, plan)
    scratch = getattr(block.kernels, f"{plan.kernel}_scratch")(block.packed(), block.double)
    tiles: tuple[tuple[str, int], ...] = ()
    if plan.kernel != "attention_delta":  # which goes by whole rows
        tiles = ("vectors", plan.vectors), ("panels", plan.panels), ("key_block", plan.key_block)
        tiles += (("fused", 1),) if plan.fused else ()
    return KernelUse(plan.kernel, plan.why, plan.threads, scratch * plan.threads, tiles, (), plan.splits, when)
