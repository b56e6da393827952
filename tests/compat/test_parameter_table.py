"""The table of parameters is complete and names tests that exist; `make parameter-table` writes it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

HERE = Path(__file__).parent
TABLE = (HERE / "PARAMETERS.md").read_text()
SPEC = importlib.util.spec_from_file_location("compat_conftest", HERE / "conftest.py")
assert SPEC is not None
assert SPEC.loader is not None
CONFTEST = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(CONFTEST)


def rows() -> dict[str, dict[str, str]]:
    """Section -> parameter -> test."""
    found: dict[str, dict[str, str]] = {}
    for section in TABLE.split("\n## ")[1:]:
        title = section.split("\n", 1)[0]
        found[title] = dict(re.findall(r"^\| `(\w+)` \| `?([^`|]*?)`? \|$", section, re.MULTILINE))
    return found


def test_every_parameter_is_shown_by_a_test_that_exists() -> None:
    table = rows()
    for system, name, owner, attribute in CONFTEST.callables():
        section = table[f"{system}: `{name}`"]
        assert list(section) == [p.name for p in CONFTEST.parameters(owner, attribute)], (system, name)
        for parameter, test in section.items():
            path, _, function = test.partition("::")
            assert function, (system, name, parameter, test)
            source = (HERE.parents[1] / path).read_text()
            assert f"def {function}(" in source, (system, name, parameter, test)
