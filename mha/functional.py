"""Multi-head attention from one packed parameter vector: MegEngine's function, forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import NDArray

from mha.core import scaled_dot_product_attention, scaled_dot_product_attention_backward
from mha.exchange import in_kind
from mha.mask_checks import Window
from mha.packed_call import PackedCall

Array = NDArray[Any]

__all__ = [
    "MultiHeadAttentionGradients",
    "MultiHeadAttentionResult",
    "multi_head_attention",
    "multi_head_attention_backward",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
]


class MultiHeadAttentionResult(NamedTuple):
    """What `multi_head_attention` returns.

    attn_output : (N, L, O) array
    attn_output_weights : (N*H, L, T) array, averaged (N, L, T), or None
    mask_reservespace, othr_reservespace :
        What the backward needs, opaque: the dropout states, and the call's inputs and projections. None in evaluation.
    """

    attn_output: Array
    attn_output_weights: Array | None
    mask_reservespace: Any
    othr_reservespace: Any


class MultiHeadAttentionGradients(NamedTuple):
    """Gradients of `multi_head_attention`, each in its input's own shape; None for what was not given."""

    query: Array
    key: Array
    value: Array
    io_weight_bias: Array
    bias_k: Array | None
    bias_v: Array | None
    key_padding_mask: Array | None
    attn_mask: Array | None


@in_kind
def multi_head_attention(
    query: Array,
    key: Array,
    value: Array,
    embed_dim: int,
    num_heads: int,
    attn_drop: float,
    out_drop: float,
    io_weight_bias: Array,
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
    *,
    num_kv_heads: int | None = None,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    causal_offset: Any = 0,
) -> MultiHeadAttentionResult:
    """Multi-head attention with its projections, all parameters in one flat vector.

    Parameters
    ----------
    query : (N, L, E) array
        float16, bfloat16, float32 or float64, E = embed_dim; or unbatched (L, E).
    key, value : (N, S, kdim) and (N, S, vdim) arrays
        Of the query's dtype; or unbatched (S, kdim), (S, vdim).
    embed_dim, num_heads : int
        E and H.
    attn_drop, out_drop : float
        Dropout of the attention weights and of the output; only in training.
    io_weight_bias : array
        Wq, Wk, Wv, Wo (each in-features x out-features, y = x @ W + b), then bq, bk, bv, bo; see `PackedLayout`.
        Any shape, C-contiguous.
    qproj_size, kproj_size, vproj_size, oproj_size : int, optional
        Widths of the projections: None = embed_dim (key and value with grouped heads: their share), 0 = none.
    qbias, kbias, vbias, obias : bool
        Whether that projection has a bias.
    bias_k, bias_v : arrays, optional
        (1, 1, kproj_size or kdim) and (1, 1, vproj_size or vdim): one key and value appended after projection.
    add_zero_attn : bool
        Append a key and value of zeros, after bias_k and bias_v. Appended positions are always visible.
    key_padding_mask : (N, S) array, optional
        bool: True = ignore. float: added to the scores. Unbatched (S,).
    attn_mask : array, optional
        (L, S), (N*H, L, S), or 4-D broadcastable to (N, H, L, S). bool: True = ignore. float: added to the scores.
    need_weights : bool
        Return the attention weights, after dropout.
    average_attn_weights : bool
        Average them over the heads.
    is_causal : bool
        Query i sees keys j <= i + causal_offset, together with every other mask.
    maybe_cudnn_style_mask : bool
        Both masks are integers: attn_mask (2, L) = first key and end of each query, key_padding_mask (2, N) =
        lengths of queries and keys.
    reslink : bool
        Add the query to the output, after dropout.
    training : bool
        Whether dropout applies and a backward may follow.
    num_kv_heads : int, optional
        Grouped-query attention: Hk heads of key and value.
    scale : float, optional
        Factor on the scores. None is ``(embed_dim // num_heads) ** -0.5``, or ``embed_dim ** -0.5`` if qproj_size is 0.
    window, softcap, causal_offset :
        As in `scaled_dot_product_attention`.

    Returns
    -------
    MultiHeadAttentionResult

    Raises
    ------
    TypeError
        For arrays of different libraries or dtypes, or masks of a wrong dtype.
    ValueError
        For shapes, sizes and flags that do not fit; the message names them all.

    Notes
    -----
    After MegEngine 1.13's ``functional.nn.multi_head_attention``, whose parameter order and vector layout it keeps.
    What MegEngine refuses or ignores works: bias_k, bias_v, add_zero_attn, reslink, unbatched inputs, a causal flag
    without or beside masks, cuDNN-style masks, no keys. Arrays that export DLPack (PyTorch, JAX) are taken without a
    copy and answered in kind.
    """
    parameters = dict(locals())
    if not training:
        return MultiHeadAttentionResult(*PackedCall.evaluate({}, **parameters), None, None)
    call = PackedCall.build(**parameters)
    return MultiHeadAttentionResult(*call.forward(), *call.reserve())


@in_kind
def multi_head_attention_backward(
    grad_attn_output: Array,
    result: MultiHeadAttentionResult,
    grad_attn_output_weights: Array | None = None,
    *,
    mask_gradients: bool = False,
) -> MultiHeadAttentionGradients:
    """Gradients of `multi_head_attention` by recomputation.

    Parameters
    ----------
    grad_attn_output : array
        Gradient of ``result.attn_output``, in its shape and dtype.
    result : MultiHeadAttentionResult
        Of a call with ``training=True``, whose inputs have not been modified since.
    grad_attn_output_weights : array, optional
        Gradient of ``result.attn_output_weights``, in its shape and dtype.
    mask_gradients : bool
        Also return the gradients of float masks.

    Returns
    -------
    MultiHeadAttentionGradients

    Raises
    ------
    ValueError
        If the call was not in training, or shapes do not fit.
    TypeError
        If dtypes or array libraries differ.
    """
    if result.othr_reservespace is None:
        raise ValueError("the forward ran with training=False and kept nothing. Call it with training=True.")
    gradients = result.othr_reservespace.backward(grad_attn_output, grad_attn_output_weights, mask_gradients)
    return MultiHeadAttentionGradients(*gradients)
