"""The case table: one list of attention problems that the tests check.

A case is data. `inputs` makes its arrays, seeded by its name; `attend` calls the package with them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """Sizes, masks and options of one call of scaled dot-product attention.

    `mask` is one of "", "bool_2d", "bool_4d", "bool_empty_rows", "float_2d", "float_4d", "float_minima", "float_row"
    (..., 1, S), "float_inf"; `lengths` draws key and query lengths; `layout` is "contiguous", "heads_last" (the view
    of (N, L, H, D) memory), "sliced" (every second element of every axis), "read_only" or "broadcast" (one key batch).
    """

    name: str
    group: str
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    queries: int = 33
    keys: int = 65
    head_dim: int = 16
    v_head_dim: int | None = None
    mask: str = ""
    lengths: bool = False
    layout: str = "contiguous"
    magnitude: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def value_width(self) -> int:
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def inputs(self, dtype: Any = np.float32) -> dict[str, Any]:
        """query, key, value, grad_output, and the mask arrays that the case has."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        kv_batch = 1 if self.layout == "broadcast" else self.batch
        shapes = {
            "query": (self.batch, self.heads, self.queries, self.head_dim),
            "key": (kv_batch, kv_heads, self.keys, self.head_dim),
            "value": (kv_batch, kv_heads, self.keys, self.value_width),
            "grad_output": (self.batch, self.heads, self.queries, self.value_width),
        }
        arrays = {
            name: _laid_out((rng.standard_normal(shape) * (self.magnitude if name != "grad_output" else 1.0)).astype(
                dtype), self.layout)
            for name, shape in shapes.items()
        }  # fmt: skip
        if self.mask:
            arrays["attn_mask"] = self._mask(rng, dtype)
        if self.lengths:
            arrays["key_lengths"] = rng.integers(0, self.keys + 1, self.batch)
            arrays["query_lengths"] = rng.integers(0, self.queries + 1, self.batch)
        return arrays

    def _mask(self, rng: np.random.Generator, dtype: Any) -> Any:
        pairs = (self.queries, self.keys)
        full = (self.batch, self.heads, *pairs)
        if self.mask == "bool_empty_rows":
            keep = rng.random(pairs) < 0.7
            keep[:: max(1, self.queries // 3)] = False
            return keep
        if self.mask.startswith("bool"):
            return rng.random(pairs if self.mask == "bool_2d" else full) < 0.7
        shape = {"float_4d": full, "float_row": (self.batch, 1, 1, self.keys)}.get(self.mask, pairs)
        bias = rng.standard_normal(shape)
        if self.mask == "float_minima":
            bias = np.where(rng.random(shape) < 0.5, np.finfo(np.float32).min, 0.0)
            bias[: max(1, self.queries // 4)] = np.finfo(np.float32).min
        if self.mask == "float_inf":
            bias = np.where(rng.random(shape) < 0.3, -np.inf, bias)
            bias[: max(1, self.queries // 4)] = -np.inf
        return bias.astype(np.float32 if self.mask == "float_minima" and np.dtype(dtype).itemsize == 2 else dtype)


def _laid_out(x: Any, layout: str) -> Any:
    if layout == "heads_last":
        return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    if layout == "sliced":
        wide = np.full([2 * size for size in x.shape], 7, x.dtype)
        wide[::2, ::2, ::2, ::2] = x
        return wide[::2, ::2, ::2, ::2]
    if layout == "read_only":
        x.flags.writeable = False
    return x


def _edges() -> list[Case]:
    sizes = [(1, 1), (1, 7), (7, 1), (2, 3), (5, 129), (129, 5), (33, 65), (64, 64), (97, 200), (200, 97)]
    cases = [Case(f"size_{q}x{k}", "edge", queries=q, keys=k) for q, k in sizes]
    cases += [Case(f"causal_{q}x{k}", "edge", queries=q, keys=k, options={"is_causal": True}) for q, k in sizes[3:]]
    cases += [Case(f"dims_{d}_{v}", "edge", head_dim=d, v_head_dim=v) for d, v in
              [(1, 1), (3, 5), (16, 8), (17, 33), (64, 64), (80, 100), (128, 40), (256, 256)]]  # fmt: skip
    cases += [Case(f"zero_{n}", "edge", **{n: 0}) for n in ("batch", "queries", "keys")]
    return cases


def _masks() -> list[Case]:
    cases = [Case(f"mask_{m}", "mask", mask=m, queries=70, keys=130) for m in
             ("bool_2d", "bool_4d", "bool_empty_rows", "float_2d", "float_4d", "float_minima", "float_row",
              "float_inf")]  # fmt: skip
    options: dict[str, dict[str, Any]] = {
        "offset": {"is_causal": True, "causal_offset": 31},
        "offset_negative": {"is_causal": True, "causal_offset": -20},
        "offset_per_sample": {"is_causal": True, "causal_offset": np.array([-3, 40])},
        "window": {"window": (10, 3)},
        "window_causal": {"window": 17, "is_causal": True},
        "softcap": {"softcap": 5.0},
        "softcap_causal": {"softcap": 2.0, "is_causal": True},
        "scale": {"scale": 0.37},
        "scale_zero": {"scale": 0.0},
        "scale_negative": {"scale": -0.5},
        "dropout": {"dropout_p": 0.3, "dropout_state": (0x1234_5678_9ABC, 5)},
        "dropout_causal": {"dropout_p": 0.5, "dropout_state": (7, 0), "is_causal": True},
        "dropout_all": {"dropout_p": 1.0, "dropout_state": (7, 1)},
    }
    cases += [Case(f"option_{name}", "mask", queries=70, keys=130, options=o) for name, o in options.items()]
    cases.append(Case("lengths", "mask", batch=5, queries=70, keys=130, lengths=True))
    cases.append(Case("everything", "mask", batch=3, heads=4, kv_heads=2, queries=70, keys=130, head_dim=24,
                      v_head_dim=20, mask="float_4d", lengths=True,
                      options={"window": (50, 20), "softcap": 8.0, "dropout_p": 0.2,
                               "dropout_state": (3, 4)}))  # fmt: skip
    cases.append(Case("large_scores", "mask", magnitude=100.0, queries=40, keys=90))
    return cases


def _shapes() -> list[Case]:
    cases = [Case(f"grouped_{h}_{k}", "shape", heads=h, kv_heads=k, queries=q, options=o)
             for h, k, q, o in [(4, 2, 33, {}), (6, 1, 50, {"is_causal": True}), (8, 2, 1, {}),
                                (4, 1, 2, {})]]  # fmt: skip
    cases += [Case(f"layout_{x}", "shape", layout=x) for x in ("heads_last", "sliced", "read_only", "broadcast")]
    cases += [Case(f"decode_{q}x{k}", "shape", heads=2, queries=q, keys=k, head_dim=40, options=o)
              for q, k, o in [(1, 1000, {}), (3, 700, {"is_causal": True, "causal_offset": 500}),
                              (1, 600, {"window": 100, "causal_offset": 400}), (8, 300, {"softcap": 3.0})]]  # fmt: skip
    cases.append(Case("decode_masked", "shape", queries=2, keys=900, mask="bool_2d", lengths=True))
    cases.append(Case("decode_float_inf", "shape", queries=3, keys=300, mask="float_inf"))
    cases.append(Case("decode_dropout", "shape", queries=1, keys=900,
                      options={"dropout_p": 0.4, "dropout_state": (99, 3)}))  # fmt: skip
    return cases


CASES = [*_edges(), *_masks(), *_shapes()]
BY_NAME = {case.name: case for case in CASES}


def in_groups(*groups: str) -> list[Case]:
    """The cases of these groups: "edge", "mask", "shape"."""
    return [case for case in CASES if case.group in groups]


def call_options(case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `scaled_dot_product_attention` for the case."""
    given = {name: arrays[name] for name in ("attn_mask", "key_lengths", "query_lengths") if name in arrays}
    grouped = case.kv_heads not in (None, case.heads)
    return {**case.options, **given, "enable_gqa": grouped}
