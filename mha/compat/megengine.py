"""MegEngine's multi-head attention as MegEngine 1.13 returns it: a pair, so that ported code unpacks as before.

The module is the package's own, which is MegEngine's: the same parameters, one packed vector, and a pair returned.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from mha.compat.differentiable import Backward, primal
from mha.functional import MultiHeadAttentionGradients
from mha.module import MultiHeadAttention
from mha.packed_call import PackedCall

Array = NDArray[Any]

__all__ = ["MultiHeadAttention", "multi_head_attention", "multi_head_attention_vjp"]


def multi_head_attention_vjp(
    query: Array,
    key: Array,
    value: Array,
    embed_dim: int,
    num_heads: int,
    attn_drop: float,
    out_drop: float,
    io_weight_bias: Array | None,
    qproj_size: int | None = None,
    kproj_size: int | None = None,
    vproj_size: int | None = None,
    oproj_size: int | None = None,
    qbias: bool = False,
    kbias: bool = False,
    vbias: bool = False,
    obias: bool = False,
    bias_k: Array | None = None,
    bias_v: Array | None = None,
    add_zero_attn: bool = False,
    key_padding_mask: Array | None = None,
    attn_mask: Array | None = None,
    need_weights: bool = False,
    average_attn_weights: bool = False,
    is_causal: bool = False,
    maybe_cudnn_style_mask: bool = False,
    reslink: bool = False,
    training: bool = True,
) -> tuple[tuple[Array, Array | None], Backward]:
    """``megengine.functional.nn.multi_head_attention``; see `mha.multi_head_attention` for the parameters.

    Returns
    -------
    output : (N, L, O) array
    weights : (N*H, L, T) array, averaged (N, L, T), or None

    Notes
    -----
    MegEngine documents four results and returns two. Its reserve spaces are `mha.multi_head_attention`'s.
    """
    options = dict(locals())
    neutral = dict(num_kv_heads=None, scale=None, window=None, softcap=None, causal_offset=0)
    call = PackedCall.build(**{name: (neutral | options)[name] for name in PackedCall.PARAMETERS})
    result = call.forward()

    def backward(
        grad_output: Array, grad_weights: Array | None = None, mask_gradients: bool = False
    ) -> dict[str, Array]:
        if not training:
            raise ValueError("the forward ran with training=False, which keeps nothing. Call it with training=True.")
        gradients = MultiHeadAttentionGradients(*call.backward(grad_output, grad_weights, mask_gradients))
        return {name: x for name, x in gradients._asdict().items() if x is not None}

    return result, backward


multi_head_attention = primal(multi_head_attention_vjp)
