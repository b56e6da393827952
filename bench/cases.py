"""What is timed: attention, its training, layers, products, and NumPy beside us. A job is data."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mha.optional import bfloat16

#: Kinds whose sizes are (N, H, Hk, L, S, D), (N, L, E, H) and (M, K, N).
ATTENTION = ("attention", "training")
LAYER = ("layer", "layer_weights", "layer_training")
PRODUCT = ("product", "beside")


@dataclass(frozen=True)
class Job:
    """One timed call. `kind` names the function in each library's table of calls."""

    name: str
    kind: str
    sizes: tuple[int, ...]
    dtype: str = "float32"
    causal: bool = False
    #: "padding": the second half of the keys hidden, bool (N, 1, 1, S); "bias": float (1, H, L, S); "window": 256.
    mask: str = ""
    #: Of a product, the operand that is the transpose of what lies in memory: "left" or "right".
    transposed: str = ""
    #: Whether our right operand is packed before the call.
    prepacked: bool = False
    #: Of our own worker; 0 is all of the run.
    threads: int = 0

    @property
    def flops(self) -> int:
        """Of one call: attention 4 N H L S D forward, 2.5 times that backward, half under a causal mask; layers add
        8 N L E E forward and twice that backward."""
        if self.kind in ATTENTION:
            n, h, _, queries, keys, d = self.sizes
            forward = 4 * n * h * queries * keys * d // (2 if self.causal else 1)
            return forward * 7 // 2 if self.kind == "training" else forward
        if self.kind in LAYER:
            n, length, width, _ = self.sizes
            projections, attention = 8 * n * length * width * width, 4 * n * length * length * width
            return 3 * projections + attention * 7 // 2 if self.kind == "layer_training" else projections + attention
        return 2 * math.prod(self.sizes)

    @property
    def read_bytes(self) -> int:
        """Of keys and values, each once."""
        n, _, kv_heads, _, keys, d = self.sizes
        return 2 * n * kv_heads * keys * d * numpy_dtype(self.dtype).itemsize

    def inputs(self) -> dict[str, Any]:
        """The arrays of the call, the same in every library."""
        rng = np.random.default_rng(zlib.crc32(repr(self.sizes).encode()))
        if self.kind in ATTENTION:
            shapes = self._attention_shapes()
        elif self.kind in LAYER:
            n, length, width, _ = self.sizes
            shapes = {"x": (n, length, width), "vector": (4 * width * width + 4 * width,), "grad": (n, length, width)}
        else:
            m, k, n = self.sizes
            shapes = {"left": (k, m) if self.transposed == "left" else (m, k),
                      "right": (n, k) if self.transposed == "right" else (k, n)}  # fmt: skip
        arrays: dict[str, Any] = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        if "vector" in arrays:
            arrays["vector"] /= np.float32(self.sizes[2] ** 0.5)
        dtype = numpy_dtype(self.dtype)
        made = {name: x.astype(dtype) for name, x in arrays.items()}
        if self.mask == "padding":
            n, _, _, _, keys, _ = self.sizes
            made["attn_mask"] = np.broadcast_to(np.arange(keys) < keys // 2, (n, 1, 1, keys)).copy()
        return made

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        n, h, kv_heads, queries, keys, d = self.sizes
        shapes = {"query": (n, h, queries, d), "key": (n, kv_heads, keys, d), "value": (n, kv_heads, keys, d),
                  "grad": (n, h, queries, d)}  # fmt: skip
        if self.mask == "bias":
            shapes["attn_mask"] = (1, h, queries, keys)
        return shapes


#: Of the job whose mask is "window".
WINDOW = 256


def numpy_dtype(name: str) -> np.dtype[Any]:
    """By its name, bfloat16 included."""
    if name != "bfloat16":
        return np.dtype(name)
    if bfloat16 is None:
        raise ImportError("bfloat16 needs ml_dtypes")
    return bfloat16


def _attention(
    n: int, h: int, length: int, d: int, keys: int = 0, kv_heads: int = 0, kind: str = "attention", **given: Any
) -> Job:
    sizes = (n, h, kv_heads or h, length, keys or length, d)
    words = [f"{n}x{h}", f"/{kv_heads}" * bool(kv_heads), f"x{length}x{keys}" if keys else f"x{length}", f"x{d}"]
    job = Job("".join(words), kind, sizes, **given)
    tags = ["fwd+bwd" * (kind == "training"), "causal" * job.causal, job.mask, job.dtype * (job.dtype != "float32"),
            f"{job.threads} thread" * bool(job.threads)]  # fmt: skip
    return replace(job, name=" ".join([job.name, *filter(None, tags)]))


def _layer(sizes: tuple[int, ...], kind: str = "layer", dtype: str = "float32") -> Job:
    tags = [kind.replace("_", " "), "x".join(map(str, sizes)), dtype * (dtype != "float32")]
    return Job(" ".join(filter(None, tags)), kind, sizes, dtype)


def _product(sizes: tuple[int, ...], transposed: str = "", prepacked: bool = False) -> Job:
    tags = ["product", "x".join(map(str, sizes)), f"{transposed}^T" * bool(transposed), "prepacked" * prepacked]
    return Job(" ".join(filter(None, tags)), "product", sizes, transposed=transposed, prepacked=prepacked)


_LENGTHS = {128: (4, 12), 512: (1, 12), 2048: (1, 8), 8192: (1, 2)}
FORWARD = [_attention(*_LENGTHS[length], length, d) for length in _LENGTHS for d in (32, 64, 80, 128)]
CAUSAL = [replace(job, name=f"{job.name} causal", causal=True) for job in FORWARD]
YARDSTICK = _attention(1, 16, 2048, 128)
BACKWARD = [
    _attention(8, 12, 128, 64, kind="training"),
    _attention(4, 12, 512, 64, kind="training"),
    _attention(1, 8, 4096, 64, kind="training"),
    _attention(1, 16, 2048, 128, kind="training", causal=True),
]
PADDING = [_attention(8, 12, 512, 64, mask="padding"), _attention(2, 8, 2048, 128, mask="padding")]
BIAS = [_attention(1, 12, 512, 64, mask="bias"), _attention(1, 8, 2048, 64, mask="bias")]
WINDOWED = [_attention(1, 8, 4096, 64, mask="window")]
DECODE = [_attention(n, 32, 1, 128, keys) for n, keys in ((1, 2048), (8, 2048), (1, 16384), (1, 65536))]
DECODE_GROUPED = [
    _attention(n, 32, 1, 128, keys, kv_heads=4) for n, keys in ((1, 2048), (8, 2048), (1, 16384), (2, 65536))
]
HALF_SIZES = [(1, 12, 512, 64), (1, 16, 2048, 128), (4, 12, 128, 64)]
BFLOAT16 = [_attention(*sizes, dtype="bfloat16") for sizes in HALF_SIZES]
FLOAT16 = [_attention(*sizes, dtype="float16") for sizes in HALF_SIZES]
SINGLE = [_attention(*sizes) for sizes in HALF_SIZES]
FLOAT64 = [_attention(*sizes, dtype="float64") for sizes in HALF_SIZES]
LAYER_SIZES = [(1, 1, 64, 4), (1, 16, 256, 8), (1, 128, 768, 12), (8, 128, 768, 12), (1, 512, 1024, 16),
               (8, 512, 768, 12)]  # fmt: skip
LAYERS = [_layer(sizes) for sizes in LAYER_SIZES]
LAYERS_BFLOAT16 = [_layer(sizes, dtype="bfloat16") for sizes in LAYER_SIZES]
LAYERS_TRAINING = [_layer(sizes, kind) for kind in ("layer_weights", "layer_training") for sizes in LAYER_SIZES[2:5]]
PRODUCT_SIZES = [(128, 768, 768), (512, 1024, 1024), (1024, 768, 3072), (2048, 2048, 2048), (4096, 4096, 4096)]
PRODUCTS = [_product(sizes, prepacked=packed) for sizes in PRODUCT_SIZES for packed in (False, True)]
TRANSPOSED = [_product(sizes, side) for sizes in PRODUCT_SIZES[:2] for side in ("left", "right")]
BESIDE = [Job(f"NumPy {n}x{n}x{n} beside a layer", "beside", (n, n, n)) for n in (256, 768)]
MEGENGINE_SIZES = [(1, 128, 256, 8), (8, 128, 512, 8), (2, 512, 512, 8)]
MEGENGINE = [_layer(sizes, kind) for kind in ("layer", "layer_training") for sizes in MEGENGINE_SIZES]
ONE_THREAD = [_attention(*sizes, threads=1) for sizes in ((1, 12, 512, 64), (1, 8, 2048, 128))]
ALL_THREADS = [replace(job, name=job.name.removesuffix(" 1 thread"), threads=0) for job in ONE_THREAD]
RECORD = [
    *(_attention(8, 12, length, 64) for length in (2, 8, 15, 17)),
    *(_attention(1, 12, 512, d) for d in (1, 33, 96, 256)),
]


def jobs() -> list[Job]:
    """The whole table, each job once. Jobs that are held against each other follow each other: within minutes a shared
    machine changes its speed by a quarter."""
    rivals = (SINGLE, FLOAT16, BFLOAT16, FLOAT64), (ALL_THREADS, ONE_THREAD)
    together = [job for group in rivals for row in zip(*group, strict=True) for job in row]
    everything = [
        together, FORWARD, CAUSAL, [YARDSTICK], BACKWARD, PADDING, BIAS, WINDOWED, DECODE, DECODE_GROUPED, LAYERS,
        LAYERS_BFLOAT16, LAYERS_TRAINING, PRODUCTS, TRANSPOSED, BESIDE, MEGENGINE, RECORD,
    ]  # fmt: skip
    return list({job.name: job for group in everything for job in group}.values())
