"""Every recorded case of the real Ivy 1.0 on NumPy; where Ivy has a bug, its documented result counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import Device

from mha.compat import ivy

DATA = Path(__file__).parents[1] / "data" / "ivy"
NAMES = sorted(path.stem for path in DATA.glob("*.npz"))

#: What Ivy does otherwise: appended keys behind the causal mask, NaN for a row without keys.
DECIDED = ("b03_causal_covers_extra_columns", "k08_fully_masked_row")
REFUSED = {
    "c03_static_and_bias_rejected": ValueError, "e02_bad_heads": ValueError, "e03_bad_ndim": ValueError,
    "e04_key_without_value": ValueError, "k09_mask_wrong_dtype": TypeError, "k10_kpm_float_rejected": TypeError,
}  # fmt: skip


def recorded(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Arguments, results, and how they were made."""
    with np.load(DATA / f"{name}.npz") as stored:
        arrays, meta = dict(stored), json.loads(str(stored["meta"]))
    given = {key[3:]: x for key, x in arrays.items() if key.startswith("in/")}
    wanted = "want/" if "want/output" in arrays else "out/"
    results = {key.partition("/")[2]: x for key, x in arrays.items() if key.startswith(wanted)}
    return given | meta["options"], results, meta


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    rest = {name: x for name, x in arguments.items() if name != "query"}
    found = ivy.multi_head_attention(arguments["query"], **rest)
    return dict(zip(("output", "weights"), found, strict=True)) if isinstance(found, tuple) else {"output": found}


def test_the_recordings_are_all_here() -> None:
    assert len(NAMES) == 39


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED and name not in DECIDED])
def test_equals_ivy(name: str, place: Device) -> None:
    arguments, results, meta = recorded(name)
    found = place.get(run(place.put(arguments)))
    assert found.keys() == results.keys()
    for which, right in results.items():
        assert found[which].dtype == right.dtype
        np.testing.assert_allclose(found[which], right, meta["rtol"], meta["atol"], err_msg=which)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_ivy_refuses(name: str) -> None:
    arguments, _, meta = recorded(name)
    assert meta.get("error")
    with pytest.raises(REFUSED[name]):
        run(arguments)


def test_a_row_without_keys_is_zero() -> None:
    arguments, results, meta = recorded("k08_fully_masked_row")
    found = run(arguments)
    for which, right in results.items():
        lost = np.isnan(right)
        assert lost.any()
        assert (found[which][lost] == 0).all()
        np.testing.assert_allclose(found[which][~lost], right[~lost], meta["rtol"], meta["atol"])


def test_the_causal_flag_leaves_appended_keys_visible() -> None:
    arguments, results, meta = recorded("b03_causal_covers_extra_columns")
    found = run(arguments)
    queries = arguments["query"].shape[1]
    same = run(arguments | {"is_causal": False, "attention_mask": ~np.tri(queries, dtype=bool)})
    for which, right in results.items():
        np.testing.assert_allclose(found[which], same[which], meta["rtol"], meta["atol"])
        assert not np.allclose(found[which], right)
