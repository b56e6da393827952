"""PyTorch's multi-head attention on NumPy and CuPy arrays; parameters are torch's, as arrays."""

from mha.compat.torch.functional import (
    multi_head_attention_forward,
    multi_head_attention_forward_vjp,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
)
from mha.compat.torch.module import MultiheadAttention

__all__ = [
    "MultiheadAttention",
    "multi_head_attention_forward",
    "multi_head_attention_forward_vjp",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_vjp",
]
