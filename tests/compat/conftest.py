"""`pytest tests/compat --parameter-table FILE` writes which test shows which parameter of the five systems.

Calls are recorded: a test shows a parameter if it passes and gave it another value than the default, or if none does,
gave it at all.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mha.compat.ivy
import mha.compat.megengine
import mha.compat.paddle
import mha.compat.rtorch
import mha.compat.torch

SYSTEMS = {
    "MegEngine": mha.compat.megengine, "PyTorch": mha.compat.torch, "R torch": mha.compat.rtorch,
    "Paddle": mha.compat.paddle, "Ivy": mha.compat.ivy,
}  # fmt: skip

#: (name of the function or method, parameter) -> tests, as file::function.
_shown: dict[tuple[str, str], set[str]] = defaultdict(set)
_given: dict[tuple[str, str], set[str]] = defaultdict(set)
_passed: set[str] = set()


def callables() -> Iterator[tuple[str, str, Any, str]]:
    """System, name as a user writes it, owner, attribute: every front end and method with parameters."""
    for system, package in SYSTEMS.items():
        for name in package.__all__:
            item = getattr(package, name)
            if inspect.isclass(item):
                for method in ("__init__", "__call__", "backward"):
                    shown = name if method == "__init__" else f"{name}.{method}"
                    yield system, shown, item, method
            elif not name.endswith("_vjp"):
                yield system, name, package, name


def parameters(owner: Any, attribute: str) -> list[inspect.Parameter]:
    """Without self."""
    found = inspect.signature(getattr(owner, attribute)).parameters.values()
    return [p for p in found if p.name != "self"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parameter-table", metavar="FILE", help="write which test shows which parameter")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--parameter-table"):
        for system, name, owner, attribute in list(callables()):
            for each in (attribute, f"{attribute}_vjp"):
                if hasattr(owner, each):
                    setattr(owner, each, _recorded(f"{system}: {name}", getattr(owner, each)))


def _recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def recorder(*args: Any, **kwargs: Any) -> Any:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0].split("[")[0]
        for parameter, value in signature.bind(*args, **kwargs).arguments.items():
            default = signature.parameters[parameter].default
            _given[name, parameter].add(test)
            if default is inspect.Parameter.empty or (value is not default and not _equal(value, default)):
                _shown[name, parameter].add(test)
        return function(*args, **kwargs)

    return recorder


def _equal(value: Any, default: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and value == default


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _passed.add(report.nodeid.split("[")[0])


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--parameter-table")
    if target:
        Path(target).write_text(_table())


def _table() -> str:
    lines = [
        "# Which test shows which parameter",
        "",
        "Written by `make parameter-table` from the calls that the tests make.",
        "",
    ]
    for system, name, owner, attribute in callables():
        lines += [f"## {system}: `{name}`", "", "| parameter | shown by |", "| --- | --- |"]
        for parameter in parameters(owner, attribute):
            key = f"{system}: {name}", parameter.name
            tests = sorted(_shown[key] & _passed or _given[key] & _passed, key=_preference)
            shown = f"`{tests[0]}`" if tests else "**nothing**"
            lines.append(f"| `{parameter.name}` | {shown} |")
        lines.append("")
    return "\n".join(lines)


def _preference(test: str) -> tuple[bool, bool, bool, bool, str]:
    """Recordings of the real system before comparisons with it, before others; what is right before what is refused."""
    return "::test_equals" not in test, "golden" not in test, "live" not in test, "bad" in test, test
