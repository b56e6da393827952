"""The parameter block that a kernel receives: the Python side of `pyx/params.pxd` and
`cupy_kernels/params.cuh`.

Every field is an int64 or a float64, in the order of the C struct; pointers are addresses. A test compares the
tables field by field.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

from mha.optional import bfloat16

#: How a value lies in memory: the numbers of the enumeration in `pyx/lanes.h`.
STORAGE: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): 0,
    np.dtype(np.float64): 1,
    np.dtype(np.float16): 2,
    np.dtype(np.bool_): 4,
}
if bfloat16 is not None:
    STORAGE[bfloat16] = 3


_INTEGER = struct.Struct("@q")


class Table:
    """The fields of a struct, flattened: a member of a nested struct is `outer.inner`.

    `pointers` are those that hold addresses.
    """

    def __init__(
        self, names: Iterable[str], doubles: frozenset[str] = frozenset(), pointers: frozenset[str] = frozenset()
    ) -> None:
        self.names = tuple(names)
        self.doubles = doubles
        self.pointers = pointers | {name for name in self.names if name.endswith((".data", ".offsets"))}
        self.index = {name: i for i, name in enumerate(self.names)}
        self._struct = struct.Struct("@" + "".join("d" if name in doubles else "q" for name in self.names))

    def pack(self, values: list[Any]) -> bytearray:
        """The block that a kernel takes."""
        return bytearray(self._struct.pack(*values))

    def unpack(self, block: bytes) -> tuple[Any, ...]:
        """The values of a packed block, in the order of `names`."""
        return self._struct.unpack(block)

    def put(self, block: bytearray, name: str, value: int) -> None:
        """Change one whole number of a packed block."""
        _INTEGER.pack_into(block, _INTEGER.size * self.index[name], value)


def _nested(outer: Iterable[str], inner: Iterable[str]) -> list[str]:
    return [f"{name}.{field}" for name in outer for field in inner]


VIEW_FIELDS = ("data", "offsets", "batch", "head", "row", "column", "storage")
MATRIX_FIELDS = ("data", "storage", "rows", "row_outer", "row_inner", "columns", "column_outer", "column_inner")

ATTENTION = Table(
    [
        *("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "v_head_dim", "extra"),
        *("score_scale", "softmax_scale", "softcap"),
        *_nested(
            ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value", "grad_weights",
             "target", "pair_keep", "pair_bias"),
            VIEW_FIELDS,
        ),
        *("lse", "shift", "row_scale", "delta"),
        *("left", "right", "position", "offset", "row_low", "row_high", "key_lengths", "query_lengths"),
        *("key_keep", "key_bias", "pair_hides"),
        *("dropout", "threshold", "seed", "dropout_offset", "total_heads", "batch_start", "head_start", "query_start"),
        *("key_start", "keep_scale", "grad_weights_scale"),
        *("threads", "vectors", "panels", "key_block", "splits", "fused", "paired", "mode"),
        *("target_batch", "target_heads", "target_rows", "target_keys", "partials"),
        *("main_thread", "scratch", "scratch_bytes"),
    ],
    doubles=frozenset({"score_scale", "softmax_scale", "softcap", "keep_scale", "grad_weights_scale"}),
    pointers=frozenset(
        {"lse", "shift", "row_scale", "delta", "offset", "row_low", "row_high", "key_lengths", "query_lengths",
         "key_keep", "key_bias", "partials", "scratch"}
    ),
)  # fmt: skip

PRODUCT = Table(
    [
        *("m", "n", "k"),
        *_nested(("left", "right", "out"), MATRIX_FIELDS),
        *("bias", "threads", "vectors", "row_block", "panels", "k_block", "right_lies"),
        *("paired", "bias_by_rows", "main_thread", "packed", "scratch", "scratch_bytes"),
    ],
    pointers=frozenset({"bias", "packed", "scratch"}),
)

NORM = Table(
    [
        *("batch", "queries", "features"),
        *_nested(("x", "residual", "total", "output"), VIEW_FIELDS),
        *("scale", "bias", "grad_scale", "grad_bias", "normalise", "epsilon"),
        *("dropout", "threshold", "seed", "dropout_offset", "batch_start", "query_start", "keep_scale"),
        *("threads", "row_block", "partials", "main_thread", "scratch", "scratch_bytes"),
    ],
    doubles=frozenset({"epsilon", "keep_scale"}),
    pointers=frozenset({"scale", "bias", "grad_scale", "grad_bias", "partials", "scratch"}),
)
