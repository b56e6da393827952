"""The Python in README.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
#: Those that show calls with a state of the reader's own have none to run with.
COMPLETE = [block for block in BLOCKS if "import numpy" in block]


def test_the_blocks_are_found() -> None:
    assert len(COMPLETE) >= 2
    assert len(BLOCKS) - len(COMPLETE) == 1


@pytest.mark.parametrize("number", range(len(COMPLETE)))
def test_block_runs(number: int) -> None:
    names: dict[str, Any] = {}
    exec(COMPLETE[number], names)
    assert names["gradients"].query.shape == (4, 100, 256)
