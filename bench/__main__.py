"""``python -m bench``: this package against unfused NumPy, PyTorch and onnxruntime, interleaved in time.

``--report`` sums the cases up in goals and writes everything to `bench/results/`.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.cases import DECODE, DECODE_GROUPED, Job, jobs
from bench.goals import GOALS
from bench.libraries import LIBRARIES
from bench.report import COLUMNS, goal_table, machine, ratios, row_of, table, write
from bench.yardsticks import fma_peak, read_bandwidth


class Worker:
    """One library in its own process."""

    def __init__(self, library: str, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "bench.worker", library, str(threads)]
        folder = Path(__file__).resolve().parents[1]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
        )
        self.unavailable = self._answer().get("unavailable")

    def run(self, job: Job, seconds: float) -> dict[str, Any]:
        """Time a job for about so long."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"job": job.name, "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker ended with status {self.process.wait()}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=30)


def measure(
    job: Job, workers: dict[str, Worker], rounds: int, seconds: float, reading: Callable[[], float] | None = None
) -> dict[str, Any]:
    """All libraries in turn, `rounds` times; `reading` measures memory in each, whose rate changes in minutes."""
    answers: dict[str, list[dict[str, Any]]] = {}
    rates = []
    for _ in range(rounds):
        if reading is not None:
            rates.append(reading())
        for name, worker in workers.items():
            answer = worker.run(job, seconds)
            if "seconds" in answer:
                answers.setdefault(name, []).append(answer)
    libraries = {}
    for name, given in answers.items():
        times = [t for answer in given for t in answer["seconds"]]
        libraries[name] = {
            "best": min(times),
            "median": statistics.median(times),
            "gflops": job.flops / min(times) * 1e-9,
            "error": given[0]["error"],
            "rms": given[0]["rms"],
            "extra_bytes": given[0]["extra_bytes"],
        }
    result = {"job": job.name, "kind": job.kind, "flops": job.flops, "libraries": libraries}
    if rates and "mha" in answers:
        # A shared machine reads twice as fast in one second as in another, so each round is a ratio of its own.
        best = [job.read_bytes * 1e-9 / min(answer["seconds"]) for answer in answers["mha"]]
        result["read_rates"] = rates
        result["read_shares"] = [ours / rate for ours, rate in zip(best, rates, strict=True)]
    return result


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    from mha import get_num_threads

    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--cases", default="*", help="pattern of case names, e.g. 'layer*'")
    parser.add_argument("--rivals", default="numpy,torch,onnxruntime", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=get_num_threads(), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each library (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of one turn (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write one JSON object a line to this file")
    parser.add_argument("--list", action="store_true", help="only list the cases")
    parser.add_argument("--report", action="store_true", help="sum up in goals, written to bench/results")
    options = parser.parse_args(argv)
    chosen = [job for job in jobs() if fnmatch.fnmatch(job.name, options.cases)]
    if options.list or not chosen:
        print("\n".join(job.name for job in (chosen or jobs())))
        return 0 if chosen else 1

    names = ["mha", *(name for name in options.rivals.split(",") if name in LIBRARIES and name != "mha")]
    workers = {name: Worker(name, options.threads) for name in names}
    for name in [name for name, worker in workers.items() if worker.unavailable]:
        print(f"{name}: passed over, {workers.pop(name).unavailable}")
    limits = measure_limits(workers, options.threads)
    known = [
        ("multiply-add peak", "peak", "GFLOP/s"),
        ("NumPy's SGEMM", "sgemm", "GFLOP/s"),
        ("memory", "read", "GB/s"),
    ]
    parts = [f"{text} {limits[name]:.0f} {unit}" for text, name, unit in known if name in limits]
    print(f"{options.threads} threads: {', '.join(parts)}")
    results = []
    for i, job in enumerate(chosen):
        if sys.stderr.isatty():
            print(f"\r\033[K[{i + 1}/{len(chosen)}] {job.name}", end="", file=sys.stderr, flush=True)
        reading = partial(read_bandwidth, options.threads) if job in [*DECODE, *DECODE_GROUPED] else None
        results.append(measure(job, workers, options.rounds, options.seconds, reading))
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    for worker in workers.values():
        worker.close()
    rivals = [name for name in workers if name != "mha"]
    rows = [row_of(result, limits) + ratios(result, rivals) for result in results]
    print(table(rows, [*COLUMNS, *(f"{name}/ours" for name in rivals)]))
    if options.json:
        facts = {"threads": options.threads, "limits": limits}
        options.json.write_text("".join(json.dumps(result | facts) + "\n" for result in results))
    if options.report:
        found = [goal.found({result["job"]: result for result in results}, limits) for goal in GOALS]
        print(f"\n{goal_table(found)}")
        print("written to", write(machine(options.threads, list(workers)), limits, results, found))
    return 0


def measure_limits(workers: dict[str, Worker], threads: int) -> dict[str, float]:
    """Multiply-adds from register to register and NumPy's SGEMM in GFLOP/s, reading memory in GB/s."""
    limits = {"peak": fma_peak(threads), "read": read_bandwidth(threads)}
    if "numpy" in workers:
        cube = next(job for job in jobs() if job.name == "product 4096x4096x4096")
        limits["sgemm"] = measure(cube, {"numpy": workers["numpy"]}, 3, 1.0)["libraries"]["numpy"]["gflops"]
    return limits


if __name__ == "__main__":
    sys.exit(main())
