"""``python -m bench.gpu``: the GPU kernels beside PyTorch's, on the same data, interleaved in one process.

Everything is checked against float64 before it is timed, with outputs that were NaN before. Times are medians of CUDA
events over repeats in turns, on inputs that rotate through more memory than the second-level cache holds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bench import gpu_report
from bench.gpu_cases import ROWS, SMOKE, Row

#: Bytes that the inputs in rotation take together: more than any second-level cache.
_ROTATION = 256 * 2**20
#: Seconds that a row may take, its checks apart.
_BUDGET = 1.5
#: Largest relative error (Frobenius) against float64.
_ERROR = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-5, "float64": 1e-13}

Call = Callable[[int], Any]


def inputs(row: Row) -> list[dict[str, Any]]:
    """Sets of torch tensors on the device: query, key, value and the gradient of the output."""
    import torch

    shape_q = (row.batch, row.heads, row.rows, row.head_dim)
    shape_k = (row.batch, row.kv_heads, row.length, row.head_dim)
    size = 2 * row.read_bytes
    sets = 1 if row.kind == "decode" else max(1, min(8, _ROTATION // max(size, 1)))
    draw = torch.Generator("cuda").manual_seed(1)
    made = []
    for _ in range(sets):
        tensors = {
            name: torch.randn(shape, generator=draw, device="cuda", dtype=torch.float32).to(getattr(torch, row.dtype))
            for name, shape in (("query", shape_q), ("key", shape_k), ("value", shape_k), ("grad", shape_q))
        }
        made.append(tensors)
    return made


def our_call(row: Row, sets: list[dict[str, Any]]) -> Call:
    """The package on CuPy views of the tensors."""
    import cupy
    import ml_dtypes
    import torch

    import mha

    def view(x: Any) -> Any:
        if x.dtype == torch.bfloat16:
            return cupy.from_dlpack(x.view(torch.int16)).view(ml_dtypes.bfloat16)
        return cupy.from_dlpack(x)

    mha.set_float32_precision(row.precision)
    arrays = [{name: view(x) for name, x in one.items()} for one in sets]
    options: dict[str, Any] = {"is_causal": row.causal, "enable_gqa": row.heads != row.kv_heads}
    if row.kind != "backward":
        return lambda i: mha.scaled_dot_product_attention(
            *(arrays[i % len(arrays)][n] for n in ("query", "key", "value")), **options
        )
    saved = [mha.scaled_dot_product_attention(a["query"], a["key"], a["value"], return_lse=True, **options)
             for a in arrays]  # fmt: skip

    def backward(i: int) -> Any:
        a, (output, lse) = arrays[i % len(arrays)], saved[i % len(arrays)]
        return mha.scaled_dot_product_attention_backward(
            a["grad"], a["query"], a["key"], a["value"], output, lse, **options
        )

    return backward


def torch_call(row: Row, sets: list[dict[str, Any]], backend: str) -> Call:
    """PyTorch with one of its back ends; one that refuses raises RuntimeError."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel = {"FLASH": SDPBackend.FLASH_ATTENTION, "CUDNN": SDPBackend.CUDNN_ATTENTION,
              "EFFICIENT": SDPBackend.EFFICIENT_ATTENTION, "MATH": SDPBackend.MATH}[backend]  # fmt: skip
    training = row.kind == "backward"
    leaves = [[one[n].detach().requires_grad_(training) for n in ("query", "key", "value")] for one in sets]

    def forward(i: int) -> Any:
        with sdpa_kernel(kernel):
            return torch.nn.functional.scaled_dot_product_attention(
                *leaves[i % len(leaves)], is_causal=row.causal, enable_gqa=row.heads != row.kv_heads
            )

    if not training:
        return forward
    saved = [forward(i) for i in range(len(leaves))]
    return lambda i: torch.autograd.grad(
        saved[i % len(saved)], leaves[i % len(saved)], sets[i % len(saved)]["grad"], retain_graph=True
    )


def check(row: Row, call: Call, sets: list[dict[str, Any]]) -> None:
    """AssertionError unless what the call gives is right: one head of one sample against float64."""
    import cupy
    import torch

    kept = min(row.rows, 512)
    made = call(0)
    results = list(made[:3]) if row.kind == "backward" else [made]
    results = [x if isinstance(x, torch.Tensor) else torch.from_dlpack(_plain(x)) for x in results]
    if any(x.dtype == torch.int16 for x in results):
        results = [x.view(torch.bfloat16) for x in results]
    cupy.cuda.Device().synchronize()
    q, k, v, g = (sets[0][n][:1, :1].double().detach().requires_grad_() for n in ("query", "key", "value", "grad"))
    if row.kind != "backward":
        q = q[:, :, :kept]
    scores = q @ k.mT * row.head_dim**-0.5
    if row.causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").tril(), -torch.inf)
    right = torch.softmax(scores, -1) @ v
    if row.kind == "backward":
        if row.heads != row.kv_heads:
            return
        truths = list(torch.autograd.grad(right, (q, k, v), g))
    else:
        truths = [right]
    for found, truth in zip(results, truths, strict=False):
        own = found[:1, :1, : truth.shape[2]].double()
        error = float(torch.linalg.norm(own - truth) / torch.linalg.norm(truth))
        bound = _ERROR[row.dtype] * (10 if row.precision != "exact" else 1)
        assert error < bound, f"{row.name}: relative error {error:.2e}, allowed {bound:.0e}"


def _plain(x: Any) -> Any:
    """DLPack knows no bfloat16 of CuPy's in every version: as int16."""
    return x.view("int16") if x.dtype.name == "bfloat16" else x


def timed(calls: dict[str, Call], budget: float = _BUDGET) -> dict[str, float]:
    """Seconds of each call, the median over turns."""
    import torch

    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    torch.cuda.synchronize()
    started, turn = time.perf_counter(), 0
    while turn < 5 or (time.perf_counter() - started < budget and turn < 200):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(turn)
            stop.record()
            stop.synchronize()
            spent[name].append(start.elapsed_time(stop) / 1e3)
        turn += 1
    return {name: statistics.median(times) for name, times in spent.items()}


def measure(row: Row, copy_rate: float) -> dict[str, Any]:
    """All libraries on one row."""
    import cupy
    import torch

    cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream).use()
    sets = inputs(row)
    backends = ["MATH"] if row.dtype == "float64" else ["EFFICIENT"] if row.dtype == "float32" else [
        "FLASH", "CUDNN", "EFFICIENT"]  # fmt: skip
    calls, refused = {"mha": our_call(row, sets)}, {}
    check(row, calls["mha"], sets)
    for backend in backends:
        try:
            call = torch_call(row, sets, backend)
            check(row, call, sets)
            calls[backend] = call
        except (RuntimeError, AssertionError, torch.OutOfMemoryError) as error:
            refused[backend] = str(error).splitlines()[0]
    return gpu_report.figures(row, timed(calls), refused, copy_rate)


def ceilings() -> dict[str, float]:
    """bfloat16 product of 8192 cubed in TFLOP/s, and a device-to-device copy in bytes/s read and written."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    times = timed({"gemm": lambda i: a @ b, "copy": lambda i: target.copy_(source)})
    return {"bfloat16 GEMM TFLOP/s": 2 * 8192**3 / times["gemm"] / 1e12, "copy bytes/s": 2 * 2**32 / times["copy"]}


def host() -> dict[str, float]:
    """Microseconds of the host for one small call, and seconds to compile a kernel and to load it again."""
    import cupy

    import mha
    from mha.gpu import load

    x = cupy.ones((1, 8, 64, 64), cupy.float16)
    before = os.environ.get("MHA_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MHA_CACHE_DIR"] = folder
        seconds = []
        for _ in range(2):
            load._loaded.clear()
            start = time.perf_counter()
            mha.scaled_dot_product_attention(x, x, x)
            cupy.cuda.Device().synchronize()
            seconds.append(time.perf_counter() - start)
        os.environ.pop("MHA_CACHE_DIR") if before is None else os.environ.update(MHA_CACHE_DIR=before)
    rounds = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            mha.scaled_dot_product_attention(x, x, x)
        rounds.append((time.perf_counter() - start) / 50)
        cupy.cuda.Device().synchronize()
    return {"call us": min(rounds) * 1e6, "call goal us": 15.0, "cold compile s": seconds[0], "warm load s": seconds[1]}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="list the rows")
    parser.add_argument("--smoke", action="store_true", help="few and small problems of ours alone, checked, not timed")
    options = parser.parse_args(arguments)
    rows = [row for row in (SMOKE if options.smoke else ROWS) if options.only in row.name]
    if options.dry_run:
        print("\n".join(f"{row.name}: {row.flops / 1e12:.3g} TFLOP" for row in rows))
        return 0
    try:
        import cupy
        import torch

        cupy.zeros(1)
        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no CUDA device")
    except Exception as error:  # whatever is missing
        print(f"no GPU to time on: {error}. Run this where CuPy and PyTorch see one.", file=sys.stderr)
        return 2
    if options.smoke:
        for row in rows:
            sets = inputs(row)
            check(row, our_call(row, sets), sets)
        print(f"{len(rows)} problems right")
        return 0
    found_ceilings = ceilings()
    found = [measure(row, found_ceilings["copy bytes/s"]) for row in rows]
    found_host = host()
    print(gpu_report.table(found))
    print(found_ceilings, found_host, sep="\n")
    print("written to", gpu_report.write(gpu_report.versions(), found_ceilings, found_host, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
