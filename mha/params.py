"""The parameter block that a kernel receives: the Python side of `pyx/params.pxd`.

Every field is an int64 or a float64, in the order of the C struct; pointers are addresses. A test compares the two
tables field by field.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: How a value lies in memory; the numbers of the enumeration in `pyx/lanes.h`.
STORAGE = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3, "bool": 4}

VIEW_FIELDS = ("data", "offsets", "head", "row", "column", "storage")

SIZES = ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "v_head_dim", "extra")
VIEWS = ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value", "grad_weights",
         "target", "pair_keep", "pair_bias")  # fmt: skip
SCALES = ("operand_scale", "score_scale", "softcap")
ROWS = ("lse", "row_scale", "delta")
MASKS = ("left", "right", "offset", "row_low", "row_high", "key_lengths", "query_lengths", "key_keep", "key_bias",
         "pair_hides")  # fmt: skip
DROPOUT = ("dropout", "threshold", "seed", "dropout_offset", "total_heads", "batch_start", "head_start", "query_start",
           "key_start", "keep_scale", "grad_weights_scale")  # fmt: skip
PLAN = ("threads", "vectors", "panels", "key_block", "splits", "fused", "mode", "target_batch", "target_heads",
        "target_rows", "target_keys", "partials", "main_thread", "scratch", "scratch_bytes")  # fmt: skip
DOUBLES = frozenset({"keep_scale", "grad_weights_scale"})

VIEW = np.dtype([(name, np.int64) for name in VIEW_FIELDS])
ATTENTION_PARAMS = np.dtype(
    [(name, np.int64) for name in SIZES]
    + [(name, np.float64) for name in SCALES]
    + [(name, VIEW) for name in VIEWS]
    + [(name, np.int64) for name in ROWS]
    + [(name, np.float64 if name in DOUBLES else np.int64) for name in MASKS + DROPOUT + PLAN]
)

MATRIX_FIELDS = ("data", "storage", "rows", "row_outer", "row_inner", "columns", "column_outer", "column_inner")
MATRICES = ("left", "right", "out")
PRODUCT_PLAN = ("bias", "threads", "vectors", "row_block", "panels", "k_block", "in_place", "main_thread", "packed",
                "scratch", "scratch_bytes")  # fmt: skip

MATRIX = np.dtype([(name, np.int64) for name in MATRIX_FIELDS])
PRODUCT_PARAMS = np.dtype(
    [(name, np.int64) for name in ("m", "n", "k")]
    + [(name, MATRIX) for name in MATRICES]
    + [(name, np.int64) for name in PRODUCT_PLAN]
)


def new_params(**fields: Any) -> np.ndarray:
    """A parameter block of one element, zero but for `fields`; windows start unlimited."""
    block = np.zeros(1, ATTENTION_PARAMS)
    block["left"] = block["right"] = -1
    for name, value in fields.items():
        block[name] = value
    return block


def as_bytes(block: np.ndarray) -> np.ndarray:
    """The block as the kernels take it."""
    return block.view(np.uint8)
