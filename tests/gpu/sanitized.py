"""A program for test_sanitizers.py: a case of the table on the emulated device under a sanitizer, perhaps with a fault.

python sanitized.py FLAVOUR CASE DTYPE [FILE TEXT REPLACEMENT]
"""

from __future__ import annotations

import sys

import devices
import emulator
import numpy as np
from problems import on_device

from mha import gpu


def main(flavour: str, name: str, dtype: str, *fault: str) -> None:
    """Forward, backward and weights of a case of the table."""
    runtime = emulator.install()
    runtime.flavour, runtime.seed = flavour, 3
    if fault:
        _, text, replacement = fault
        runtime.faults = [(text, replacement)]
    device = devices.get("emulated")
    problem, arrays, _, _, truth, _ = on_device(name, dtype, device)
    output, _, rows = gpu.attention_forward(problem)
    gpu.attention_backward(problem, arrays["grad_output"], output, rows)
    gpu.attention_weights(problem, rows, True)
    wrong = np.abs(device.get(output).astype(float) - truth.output.astype(float)).max(initial=0)
    print("right" if wrong < 0.05 else f"wrong by {wrong}")


if __name__ == "__main__":
    main(*sys.argv[1:])
