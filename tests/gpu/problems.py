"""Problems of the case table on a device, beside what the reference makes of them on the CPU."""

from __future__ import annotations

from typing import Any

from cases import BY_NAME
from devices import Device
from shared import prepared, problem_of


def on_device(name: str, dtype: str, device: Device, with_weights: bool = False) -> tuple[Any, ...]:
    """(problem, arrays, gradient of the weights) of the device; (problem, arrays), truth and naive of the CPU."""
    host, arrays, grad_weights, truth, naive = prepared(name, dtype, with_weights)
    there = device.put(arrays)
    case = BY_NAME[name]
    options = device.put(case.options)
    moved = type(case)(**{**vars(case), "options": options})
    problem = problem_of(moved, there)
    return problem, there, device.put(grad_weights), (host, arrays, grad_weights), truth, naive
