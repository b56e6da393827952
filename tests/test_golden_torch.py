"""PyTorch 2.13's recorded scaled dot-product attention through the public functions, gradients included."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mha

PATHS = sorted((Path(__file__).parent / "data" / "torch").glob("s*.npz"))


def test_the_recordings_are_all_here() -> None:
    assert len(PATHS) == 11


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_equals_torch(path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHA_BACKEND", backend)
    with np.load(path) as stored:
        arrays = dict(stored)
    meta = json.loads(str(arrays["meta"]))
    given = {name[3:]: x for name, x in arrays.items() if name.startswith("in/")}
    output, lse = mha.scaled_dot_product_attention(**given, **meta["call"], return_lse=True)
    tolerance = {"rtol": meta["rtol"], "atol": meta["atol"]}
    np.testing.assert_allclose(output, arrays["out/output"], **tolerance)
    gradients = mha.scaled_dot_product_attention_backward(
        arrays["up/output"], **given, output=output, lse=lse, **meta["call"], mask_gradients=True
    )
    expected = {name[5:]: x for name, x in arrays.items() if name.startswith("grad/")}
    assert set(expected) >= {"query", "key", "value"}
    for name, gradient in expected.items():
        found = getattr(gradients, name)
        assert found.shape == gradient.shape
        np.testing.assert_allclose(found, gradient, **tolerance, err_msg=name)
