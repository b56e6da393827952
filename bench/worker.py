"""The process of one library: reads jobs from standard input, one JSON object a line, and answers each.

Two thread pools in one process steal each other's cores, so every library has its own process and sleeps while
another is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench.cases import Job, jobs
from bench.libraries import LIBRARIES, NotOffered, plain
from bench.truth import TOLERANCE, errors


def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("threads", type=int)
    options = vars(parser.parse_args())
    try:
        calls = LIBRARIES[options["library"]](options["threads"])
    except ImportError as error:
        print(json.dumps({"unavailable": str(error)}), flush=True)
        return
    print(json.dumps({"ready": True}), flush=True)
    table = {job.name: job for job in jobs()}

    @lru_cache(maxsize=1)
    def prepared(name: str) -> tuple[Callable[[], Any], dict[str, Any]]:
        return _prepare(table[name], calls)

    for line in sys.stdin:
        request = json.loads(line)
        try:
            call, facts = prepared(request["job"])
            print(json.dumps(facts | {"seconds": _time(call, request["seconds"])}), flush=True)
        except NotOffered as reason:
            print(json.dumps({"not_offered": str(reason)}), flush=True)


def _prepare(job: Job, calls: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """The timed call, checked; its error and the memory it takes beyond its result."""
    if job.kind not in calls:
        raise NotOffered(f"no {job.kind}")
    arrays = job.inputs()
    call = calls[job.kind](job, arrays)
    made = plain(getattr(call, "checked", call)())
    found = errors(job, arrays, made)
    if not found.largest <= TOLERANCE[job.dtype]:
        raise SystemExit(f"{job.name}: relative error {found.largest:.2g}: a wrong result is not timed")
    results = sum(x.nbytes for x in made)
    del made
    call()
    floor = _reset_peak()
    call()
    extra = None if floor is None else max(0, (_peak() or 0) - floor - results)
    return call, {"error": found.largest, "rms": found.rms, "extra_bytes": extra}


def _time(call: Callable[[], Any], seconds: float) -> list[float]:
    """Times of single calls, for about `seconds`; what runs before each call is not timed."""
    before = getattr(call, "before", None)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        if before:
            before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _peak() -> int | None:
    """The largest memory this process has held since the last reset, in bytes; Linux only."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _reset_peak() -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _peak()


if __name__ == "__main__":
    main()
