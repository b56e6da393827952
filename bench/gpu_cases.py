"""The rows of the GPU bench: what is timed, how much work it is, and the goal it has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One attention problem: `kind` is "forward", "backward" or "decode"."""

    kind: str
    dtype: str
    length: int
    head_dim: int
    causal: bool = False
    batch: int = 1
    heads: int = 16
    kv_heads: int = 16
    queries: int = 0
    precision: str = "exact"

    @property
    def name(self) -> str:
        """As the table states it."""
        parts = [self.kind, self.dtype, f"L{self.length}", f"D{self.head_dim}", "causal" if self.causal else ""]
        parts += [f"N{self.batch}", f"H{self.heads}", f"{self.kv_heads} kv" if self.kv_heads != self.heads else ""]
        parts += [self.precision if self.precision != "exact" else ""]
        return " ".join(part for part in parts if part)

    @property
    def rows(self) -> int:
        """Queries of a head."""
        return self.queries or self.length

    @property
    def flops(self) -> float:
        """4 N H L S D for the forward, 2.5 times that for the backward, half of both under a causal mask."""
        forward = 4.0 * self.batch * self.heads * self.rows * self.length * self.head_dim
        return forward * (2.5 if self.kind == "backward" else 1.0) * (0.5 if self.causal else 1.0)

    @property
    def read_bytes(self) -> int:
        """Of keys and values."""
        size = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        return 2 * self.batch * self.kv_heads * self.length * self.head_dim * size


@dataclass(frozen=True)
class Goal:
    """`measure` is "share of FLASH", "share of copy", "TFLOP/s" or "times MATH"."""

    measure: str
    least: float

    def met(self, found: float | None) -> bool | None:
        """None where there is nothing to compare with."""
        return None if found is None else found >= self.least

    def __str__(self) -> str:
        return f"{self.measure} >= {self.least:g}"


def _training() -> list[Row]:
    rows = []
    for head_dim in (64, 128, 256):
        for length in (512, 1024, 2048, 4096, 8192, 16384):
            size = {"batch": 16384 // length, "heads": 2048 // head_dim, "kv_heads": 2048 // head_dim}
            for causal in (False, True):
                for kind in ("forward", "backward"):
                    rows.append(Row(kind, "bfloat16", length, head_dim, causal, **size))
    return rows


def _others() -> list[Row]:
    rows = [Row(kind, "float16", 8192, 128, batch=2) for kind in ("forward", "backward")]
    for head_dim in (64, 128):
        for kind in ("forward", "backward"):
            for precision in ("exact", "tf32x3"):
                rows.append(Row(kind, "float32", 4096, head_dim, batch=2, precision=precision))
            rows.append(Row(kind, "float64", 2048, head_dim, batch=2))
    decode = [(1, 2**21, 8, 1), (8, 65536, 32, 8), (64, 8192, 32, 8), (16, 8192, 32, 32)]
    rows += [Row("decode", "bfloat16", s, 128, batch=n, heads=h, kv_heads=k, queries=1) for n, s, h, k in decode]
    return rows


ROWS = [*_training(), *_others()]
#: Few and small, for compute-sanitizer.
SMOKE = [Row(kind, dtype, 200, 64, causal, heads=2, kv_heads=2) for kind in ("forward", "backward")
         for dtype, causal in (("bfloat16", True), ("float32", False), ("float64", False))]  # fmt: skip


def goals(row: Row) -> list[Goal]:
    """What the row should reach."""
    if row.kind == "decode":
        return [Goal("share of copy", 0.85)]
    if row.dtype == "float32":
        return [Goal("TFLOP/s", 35.0)] if row.kind == "forward" and row.precision == "exact" else []
    if row.dtype == "float64":
        return [Goal("TFLOP/s", 30.0), Goal("times MATH", 2.0)] if row.kind == "forward" else []
    if row.length == 8192:
        return [Goal("share of FLASH", 0.9 if row.kind == "forward" else 0.7)]
    return []
