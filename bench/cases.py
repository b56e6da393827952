"""What is timed: attention from the tests' case table, training, layers, products, and NumPy beside us."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from cases import BY_NAME, Case, in_groups

LAYERS = [(1, 1, 64, 4), (1, 16, 256, 8), (1, 128, 768, 12), (8, 128, 768, 12), (1, 512, 1024, 16), (8, 512, 768, 12)]
PRODUCTS = [(128, 768, 768), (1024, 768, 768), (4096, 768, 768), (512, 1024, 1024)]
TRAINING = ["real_8x12x128x64", "real_causal_4x12x512x64", "real_causal_1x16x2048x128"]


@dataclass(frozen=True)
class Job:
    """One row of the table. `kind` names the function in each library's table of calls."""

    name: str
    kind: str
    sizes: tuple[int, ...] = ()
    case: str = ""
    dtype: str = "float32"

    @property
    def attention(self) -> Case:
        """Its row of the tests' table."""
        return BY_NAME[self.case]

    @property
    def flops(self) -> int:
        """Of one call: attention 4 N H L S D forward and 2.5 times that backward; layers add 8 N L E E."""
        if self.kind == "attention":
            return self.attention.flops
        if self.kind == "training":
            return self.attention.flops * 7 // 2
        if self.kind == "layer":
            n, length, width, _ = self.sizes
            return 8 * n * length * width * width + 4 * n * length * length * width
        m, n, k = self.sizes
        return 2 * m * n * k

    def inputs(self) -> dict[str, Any]:
        """The arrays of the call, the same in every library."""
        rng = np.random.default_rng(len(self.name))
        if self.kind in ("attention", "training"):
            return self.attention.inputs(np.dtype(self.dtype))
        if self.kind == "layer":
            n, length, width, _ = self.sizes
            x = rng.standard_normal((n, length, width)).astype(np.float32)
            vector = rng.standard_normal(4 * width * width + 4 * width).astype(np.float32) / np.float32(width**0.5)
            return {"x": x, "vector": vector}
        m, n, k = self.sizes
        left, right = ((m, k), (k, n))
        if self.kind == "product_of_transposed_right":
            right = (n, k)
        if self.kind == "product_of_transposed_left":
            left = (k, m)
        return {"left": rng.standard_normal(left).astype("f4"), "right": rng.standard_normal(right).astype("f4")}


def jobs() -> list[Job]:
    """The whole table."""
    rows = [Job(case.name.removeprefix("real_"), "attention", case=case.name) for case in in_groups("real")]
    rows += [Job("1x16x2048x128 float16", "attention", case="real_1x16x2048x128", dtype="float16")]
    rows += [Job(f"{name.removeprefix('real_')} fwd+bwd", "training", case=name) for name in TRAINING]
    rows += [Job("layer " + "x".join(map(str, sizes)), "layer", sizes) for sizes in LAYERS]
    for sizes in PRODUCTS:
        text = "x".join(map(str, sizes))
        rows.append(Job(f"product {text}", "product", sizes))
        rows.append(Job(f"product {text} right^T", "product_of_transposed_right", sizes))
        rows.append(Job(f"product {text} left^T", "product_of_transposed_left", sizes))
    rows += [Job(f"NumPy {n}x{n}x{n} beside a layer", "beside", (n, n, n)) for n in (256, 768)]
    return rows
