"""What the kernels are held to: rows of jobs, the figure that each job gives, and how good is good enough."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench import cases
from bench.cases import Job

Results = dict[str, dict[str, Any]]
Limits = dict[str, float]
Figure = Callable[[Job, Results, Limits], float | None]


@dataclass(frozen=True)
class Goal:
    """The geometric mean of the jobs' figures should be at least `least`, and none under `floor`; with `most` a figure
    is a cost and none may be above it."""

    what: str
    jobs: list[Job]
    figure: Figure
    unit: str = "x"
    least: float | None = None
    floor: float | None = None
    stretch: float | None = None
    most: float | None = None

    def found(self, results: Results, limits: Limits) -> dict[str, Any]:
        """The figures by job, what they come to, and whether that is enough; None without a figure or a goal."""
        figures = {job.name: self.figure(job, results, limits) for job in self.jobs}
        known = {name: value for name, value in figures.items() if value is not None}
        if not known:
            return {"what": self.what, "figures": {}, "mean": None, "worst": None, "met": None, "goal": self.text()}
        mean = statistics.geometric_mean(max(value, 1e-9) for value in known.values())
        worst = max(known, key=known.__getitem__) if self.most is not None else min(known, key=known.__getitem__)
        met: bool | None = None
        if self.most is not None:
            met = known[worst] <= self.most
        elif self.least is not None:
            met = mean >= self.least and known[worst] >= (self.floor or 0)
        return {"what": self.what, "figures": known, "mean": mean, "worst": worst, "met": met, "goal": self.text()}

    def text(self) -> str:
        """The goal in words."""
        if self.most is not None:
            return f"<= {self.most:g}{self.unit}"
        parts = [f">= {self.least:g}{self.unit}"] if self.least is not None else ["for the record"]
        parts += [f"none < {self.floor:g}{self.unit}"] if self.floor else []
        parts += [f"stretch {self.stretch:g}{self.unit}"] if self.stretch else []
        return ", ".join(parts)


def _best(job: Job, library: str, results: Results) -> float | None:
    found = results.get(job.name, {}).get("libraries", {}).get(library)
    return None if found is None else float(found["best"])


def against(*rivals: str) -> Figure:
    """The fastest rival's time over ours."""

    def figure(job: Job, results: Results, limits: Limits) -> float | None:
        times = [t for name in rivals if (t := _best(job, name, results)) is not None]
        ours = _best(job, "mha", results)
        return min(times) / ours if times and ours else None

    return figure


def _against_job(other: dict[str, Job]) -> Figure:
    """The time of another job of ours, by name, over that of this one."""

    def figure(job: Job, results: Results, limits: Limits) -> float | None:
        ours, yardstick = _best(job, "mha", results), _best(other[job.name], "mha", results)
        return yardstick / ours if ours and yardstick else None

    return figure


def _share_of_sgemm(job: Job, results: Results, limits: Limits) -> float | None:
    ours, sgemm = _best(job, "mha", results), limits.get("sgemm")
    return 100 * job.flops * 1e-9 / ours / sgemm if ours and sgemm else None


def _share_of_bandwidth(job: Job, results: Results, limits: Limits) -> float | None:
    """Of what the threads read memory at beside the job; keys and values that a cache holds may come faster."""
    shares = results.get(job.name, {}).get("read_shares")
    return 100 * statistics.median(shares) if shares else None


def _slowdown_of_numpy(job: Job, results: Results, limits: Limits) -> float | None:
    libraries = results.get(job.name, {}).get("libraries", {})
    if not {"mha", "numpy"} <= libraries.keys():
        return None
    return float(libraries["mha"]["median"] / libraries["numpy"]["median"])


def _microseconds(job: Job, results: Results, limits: Limits) -> float | None:
    ours = _best(job, "mha", results)
    return ours * 1e6 if ours else None


def _extra_memory(job: Job, results: Results, limits: Limits) -> float | None:
    """Bytes beyond the results, as a share of one float32 matrix L x S a head."""
    ours = results.get(job.name, {}).get("libraries", {}).get("mha")
    n, h, _, queries, keys, _ = job.sizes
    return None if ours is None or ours["extra_bytes"] is None else 100 * ours["extra_bytes"] / (
        4 * n * h * queries * keys)  # fmt: skip


def _error_ratio(job: Job, results: Results, limits: Limits) -> float | None:
    libraries = results.get(job.name, {}).get("libraries", {})
    if not {"mha", "torch"} <= libraries.keys():
        return None
    return float(libraries["mha"]["rms"] / libraries["torch"]["rms"])


#: MegEngine 1.13 on a CPU, milliseconds: a layer in evaluation, and forward and backward in training.
_MEGENGINE = dict(zip((job.name for job in cases.MEGENGINE), (2.2, 53, 80, 10.6, 203, 313), strict=True))


def _against_megengine(job: Job, results: Results, limits: Limits) -> float | None:
    ours = _best(job, "mha", results)
    return _MEGENGINE[job.name] * 1e-3 / ours if ours else None


def _pairs(jobs: list[Job], others: list[Job]) -> dict[str, Job]:
    return {job.name: other for job, other in zip(jobs, others, strict=True)}


_torch = against("torch")
GOALS = [
    Goal("float32 forward, L from 128 to 8192, D 32 to 128, torch / ours", cases.FORWARD, _torch, "x", 1.25, 1.0, 1.4),
    Goal("float32 forward, causal, torch / ours", cases.CAUSAL, _torch, "x", 1.5, 1.1, 1.8),
    Goal("share of NumPy's SGEMM, 4096 cubed", [cases.YARDSTICK], _share_of_sgemm, "%", 95, None, 110),
    Goal("float32 forward + backward, torch / ours", cases.BACKWARD, _torch, "x", 1.3, None, 1.5),
    Goal("key padding, half of the keys, torch / ours", cases.PADDING, _torch, "x", 1.3),
    Goal("float bias (1, H, L, S), torch / ours", cases.BIAS, _torch, "x", 1.3),
    Goal("window 256 at L 4096, torch / ours", cases.WINDOWED, _torch, "x", 4),
    Goal("decode, share of the read bandwidth", [*cases.DECODE, *cases.DECODE_GROUPED], _share_of_bandwidth, "%", 90,
         None, 95),
    Goal("decode, torch / ours", cases.DECODE, _torch, "x", 1.0),
    Goal("decode, 8 query heads a key head, torch / ours", cases.DECODE_GROUPED, _torch, "x", 3),
    Goal("bfloat16 forward, our float32 / ours", cases.BFLOAT16, _against_job(_pairs(cases.BFLOAT16, cases.SINGLE)),
         "x", 1.0, None, 1.5),
    Goal("float16 forward, our float32 / ours", cases.FLOAT16, _against_job(_pairs(cases.FLOAT16, cases.SINGLE)),
         "x", 1.0, None, 1.5),
    Goal("bfloat16 forward, torch / ours", cases.BFLOAT16, _torch),
    Goal("float16 forward, torch / ours", cases.FLOAT16, _torch),
    Goal("float64 forward, torch / ours", cases.FLOAT64, _torch, "x", 2),
    Goal("layer in evaluation, torch / ours", cases.LAYERS, _torch, "x", 1.15, 1.0, 1.3),
    Goal("layer in evaluation, bfloat16, torch / ours", cases.LAYERS_BFLOAT16, _torch, "x", 1.0, None, 1.3),
    Goal("layer with averaged weights, and its training, torch / ours", cases.LAYERS_TRAINING, _torch, "x", 1.5, None,
         2),
    Goal("products, better of NumPy and torch / ours", cases.PRODUCTS, against("numpy", "torch"), "x", 0.95, 0.85,
         1.05),
    Goal("products of transposed operands, better of NumPy and torch / ours", cases.TRANSPOSED,
         against("numpy", "torch")),
    Goal("a NumPy product beside a layer, its time alone = 1", cases.BESIDE, _slowdown_of_numpy, "x", most=1.2),
    Goal("layer, MegEngine 1.13 / ours", cases.MEGENGINE, _against_megengine, "x", 4),
    Goal("a layer of one token, the whole call", cases.LAYERS[:1], _microseconds, " us", most=15),
    Goal("second thread", cases.ALL_THREADS, _against_job(_pairs(cases.ALL_THREADS, cases.ONE_THREAD)), "x", 1.9),
    Goal("memory beside the results, L >= 2048, share of L x S", [job for job in cases.FORWARD if job.sizes[3] >= 2048],
         _extra_memory, "%", most=5),
    Goal("error (root mean square), torch's = 1", cases.FORWARD, _error_ratio, "x", most=1.25),
    Goal("L = 2, 8, 15, 17; D = 1, 33, 96, 256, torch / ours", cases.RECORD, _torch),
]  # fmt: skip
