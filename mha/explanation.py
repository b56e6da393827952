"""What `mha.explain` returns: which kernels a call would take, how, why, and what memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mha.problem import AttentionProblem


@dataclass(frozen=True)
class KernelUse:
    """One kernel of a call.

    name : str
    why : str
        What decided on its plan.
    threads : int
        Of the team on a CPU, of each block on a GPU.
    memory : int
        Bytes of scratch of all threads on a CPU, of shared memory of each block on a GPU.
    tiles : pairs of str and int
        What its loops are cut into; on a GPU all that is compiled in.
    grid : tuple of int
        Blocks of threads on a GPU; () on a CPU.
    splits : int
        Parts of the keys that are worked on apart and combined.
    when : str
        What of the values decides whether it runs; "" if it always does.
    """

    name: str
    why: str
    threads: int
    memory: int
    tiles: tuple[tuple[str, int], ...]
    grid: tuple[int, ...] = ()
    splits: int = 1
    when: str = ""

    def __str__(self) -> str:
        parts = [f"{' x '.join(map(str, self.grid))} blocks of {self.threads} threads"] if self.grid else []
        parts += [] if self.grid else [f"{self.threads} thread{'s' * (self.threads != 1)}"]
        parts += [f"{self.splits} splits"] if self.splits > 1 else []
        parts += [f"{size(self.memory)} of {'shared memory each' if self.grid else 'scratch'}"]
        condition = f" {self.when}" if self.when else ""
        reason = f": {self.why}" if self.why else ""
        return f"{self.name}{condition}, {', '.join(parts)}{reason}"


@dataclass(frozen=True)
class Pass:
    """The forward or the backward: its kernels in their order, bytes of the results, and bytes beside them at most."""

    kernels: tuple[KernelUse, ...]
    output_bytes: int
    temporary_bytes: int


@dataclass(frozen=True)
class Explanation:
    """How a call of `scaled_dot_product_attention` and its backward would run.

    backend : str
        "cpu", "gpu" or "reference".
    device : str
        What the kernels would run on.
    why : str
        Why this backend.
    problem : str
        Sizes and dtype.
    forward, backward : Pass
        The backward as `scaled_dot_product_attention_backward` makes it, from a log-sum-exp.
    """

    backend: str
    device: str
    problem: str
    forward: Pass
    backward: Pass
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; tiles by name."""
        found = dataclasses.asdict(self)
        for one in (found["forward"], found["backward"]):
            one["kernels"] = [
                kernel | {"tiles": dict(kernel["tiles"]), "grid": list(kernel["grid"])} for kernel in one["kernels"]
            ]
        return found

    def __str__(self) -> str:
        lines = [f"{self.problem}", f"{self.backend} backend ({self.why}): {self.device}"]
        for name, one in (("forward", self.forward), ("backward", self.backward)):
            lines.append(f"{name}: {size(one.output_bytes)} of results, {size(one.temporary_bytes)} beside them")
            for kernel in one.kernels:
                lines.append(f"    {kernel}")
                if kernel.tiles:
                    lines.append(f"        {', '.join(f'{tile} {value}' for tile, value in kernel.tiles)}")
            if not one.kernels:
                lines.append("    no kernel")
        return "\n".join(lines)


def described(problem: AttentionProblem) -> str:
    """Sizes and dtype."""
    s = problem.sizes
    named = dict(N=s.batch, H=s.heads, Hk=s.kv_heads, L=s.queries, S=s.keys, D=s.head_dim, Dv=s.v_head_dim)
    return ", ".join(f"{name} {n}" for name, n in named.items()) + f", {problem.dtype}"


def size(count: int) -> str:
    """Bytes as people read them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count // scale} {unit}"
    return f"{count} bytes"
