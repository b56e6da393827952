"""Fused multi-head attention, forward and backward, for arrays without a deep-learning framework.

From top to bottom; imports go down only.

    functional, module, compat.*     names, defaults, docstrings; compat: five other systems' own
    info                             what is installed, and what a call would run
    packed_call, compat.stacked      parameter formats: one flat vector, stacked matrices (packing, convert)
    layer, core                      projections around attention on heads; attention on heads
    projection, matrix               the products around it
    masks                            the only place that interprets a mask
    problem                          the only validator of shapes and dtypes
    dispatch                         type of the arrays -> backend
    exchange                         DLPack: other libraries' arrays taken and answered in kind
    cpu | reference_backend          plan (pure) -> launch (memory) -> kernel
"""

from mha import convert, random
from mha.core import AttentionGradients, scaled_dot_product_attention, scaled_dot_product_attention_backward
from mha.cpu.threads import get_num_threads, set_num_threads
from mha.explanation import Explanation
from mha.functional import (
    MultiHeadAttentionGradients,
    MultiHeadAttentionResult,
    multi_head_attention,
    multi_head_attention_backward,
)
from mha.info import explain, show_config
from mha.module import MultiHeadAttention
from mha.packing import PackedLayout
from mha.precision import get_float32_precision, set_float32_precision
from mha.random import seed

__version__ = "0.1.0"

__all__ = [
    "AttentionGradients",
    "Explanation",
    "MultiHeadAttention",
    "MultiHeadAttentionGradients",
    "MultiHeadAttentionResult",
    "PackedLayout",
    "convert",
    "explain",
    "get_float32_precision",
    "get_num_threads",
    "multi_head_attention",
    "multi_head_attention_backward",
    "random",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
    "seed",
    "set_float32_precision",
    "set_num_threads",
    "show_config",
]
