"""Paddle's fused multi-head attention block on NumPy and CuPy arrays; Paddle itself has it on GPUs only."""

from mha.compat.paddle.functional import fused_multi_head_attention, fused_multi_head_attention_vjp
from mha.compat.paddle.module import FusedMultiHeadAttention

__all__ = ["FusedMultiHeadAttention", "fused_multi_head_attention", "fused_multi_head_attention_vjp"]
