"""`mha/params.py`, `pyx/params.pxd` and `cupy_kernels/params.cuh` are one table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mha.params import ATTENTION, NORM, PRODUCT, STORAGE, Table

SOURCE = Path(__file__).parents[1] / "pyx"
CUDA = Path(__file__).parents[1] / "cupy_kernels"


def structs() -> dict[str, list[tuple[str, str]]]:
    """Name -> (type, field) of every struct, as the Cython source declares them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, body in re.findall(r"cdef struct (\w+):\n((?:    .*\n|\n)+)", (SOURCE / "params.pxd").read_text()):
        lines = [line.split("#")[0].strip() for line in body.splitlines()]
        found[name] = [tuple(line.rsplit(" ", 1)) for line in lines if line]  # type: ignore[misc]
    return found


def flattened(name: str, prefix: str = "") -> list[tuple[str, str]]:
    fields = []
    for kind, field in structs()[name]:
        if kind in structs():
            fields += flattened(kind, f"{prefix}{field}.")
        else:
            fields.append((kind, prefix + field))
    return fields


def cuda_structs() -> dict[str, list[tuple[str, str]]]:
    """The same of the CUDA source."""
    text = (CUDA / "params.cuh").read_text()
    found: dict[str, list[tuple[str, str]]] = {}
    for name, body in re.findall(r"^struct (\w+) {\n(.*?)^};", text, re.MULTILINE | re.DOTALL):
        lines = [line.split("//")[0].strip().rstrip(";") for line in body.splitlines()]
        found[name] = [tuple(re.sub(r" \*(\w+)$", r"* \1", line).rsplit(" ", 1)) for line in lines if line]  # type: ignore[misc]
    return found


@pytest.mark.parametrize("struct", ["TensorView", "AttentionParams", "NormParams"])
def test_the_cuda_structs_are_the_same(struct: str) -> None:
    own = {"int64_t": "int64", "const int64_t*": "const int64*"}
    assert cuda_structs()[struct] == [(own.get(kind, kind), field) for kind, field in structs()[struct]]


@pytest.mark.parametrize(
    ("struct", "table"), [("AttentionParams", ATTENTION), ("ProductParams", PRODUCT), ("NormParams", NORM)]
)
def test_fields_and_their_order_agree(struct: str, table: Table) -> None:
    declared = flattened(struct)
    assert [field for _, field in declared] == list(table.names)
    assert {field for kind, field in declared if kind == "double"} == set(table.doubles)
    assert {field for kind, field in declared if kind.endswith("*")} == set(table.pointers)


def test_every_field_is_eight_bytes_wide() -> None:
    kinds = {kind for struct in ("AttentionParams", "ProductParams", "NormParams") for kind, _ in flattened(struct)}
    assert all(kind in ("int64_t", "double") or kind.endswith("*") for kind in kinds), kinds


def test_storage_numbers_are_the_headers() -> None:
    names = re.search(r"enum \{ (MHA_FLOAT32.*?) \}", (SOURCE / "lanes.h").read_text())
    assert names is not None
    order = [name.removeprefix("MHA_").lower() for name in names.group(1).split(", ")]
    assert {dtype.name: number for dtype, number in STORAGE.items()}.items() <= {
        n: i for i, n in enumerate(order)
    }.items()


def test_a_block_of_the_wrong_size_is_refused() -> None:
    from mha.cpu import load

    kernels = load.kernels(load.chosen_level())
    for name in ("attention_forward", "attention_backward", "product", "residual_norm"):
        with pytest.raises(ValueError, match="parameter block of 16 bytes"):
            getattr(kernels, name)(bytearray(16), False)
