"""Every kernel test runs at every level this machine has."""

from __future__ import annotations

import pytest

from mha.cpu import load


@pytest.fixture(params=load.runnable_levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction-set level that is built and runs here."""
    monkeypatch.setenv("MHA_CPU_ISA", request.param)
    return request.param
