"""Ivy's multi-head attention on NumPy and CuPy arrays, right also for batches.

Any array argument may be a nested dict of arrays, as an ``ivy.Container`` is: the result has the same structure.
"""

from mha.compat.ivy.functional import multi_head_attention, multi_head_attention_vjp
from mha.compat.ivy.module import MultiHeadAttention

__all__ = ["MultiHeadAttention", "multi_head_attention", "multi_head_attention_vjp"]
