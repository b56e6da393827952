"""The functions of ``torch.nn.functional``."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from mha import core
from mha.compat.differentiable import Backward, primal, refuse_grad_weights
from mha.compat.stacked import StackedCall
from mha.random import next_state

Array = NDArray[Any]

#: Parameters of `multi_head_attention_forward` by the names that `StackedCall` has for them.
_NAMES = {
    "in_weight": "in_proj_weight", "q_weight": "q_proj_weight", "k_weight": "k_proj_weight",
    "v_weight": "v_proj_weight", "in_bias": "in_proj_bias", "out_weight": "out_proj_weight",
    "out_bias": "out_proj_bias", "bias_k": "bias_k", "bias_v": "bias_v", "static_k": "static_k",
    "static_v": "static_v",
}  # fmt: skip


def multi_head_attention_forward_vjp(
    query: Array,
    key: Array,
    value: Array,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Array | None,
    in_proj_bias: Array | None,
    bias_k: Array | None,
    bias_v: Array | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Array,
    out_proj_bias: Array | None,
    training: bool = True,
    key_padding_mask: Array | None = None,
    need_weights: bool = True,
    attn_mask: Array | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Array | None = None,
    k_proj_weight: Array | None = None,
    v_proj_weight: Array | None = None,
    static_k: Array | None = None,
    static_v: Array | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[tuple[Array, Array | None], Backward]:
    """``torch.nn.functional.multi_head_attention_forward``, sequence first.

    Parameters
    ----------
    query : (L, N, E) array
        Or unbatched (L, E).
    key, value : (S, N, kdim) and (S, N, vdim) arrays
        Or unbatched. With `in_proj_weight` both widths are E.
    embed_dim_to_check, num_heads : int
        E, which the query must have, and H.
    in_proj_weight : (3*E, E) array or None
        Rows of query, key and value; or, with `use_separate_proj_weight`, `q_proj_weight` (E, E), `k_proj_weight`
        (E, kdim) and `v_proj_weight` (E, vdim). Separate weights may have any number of rows that H divides.
    in_proj_bias : (3*E,) array or None
    bias_k, bias_v : (1, 1, E) arrays or None
        One key and value appended to every sample's, always visible.
    add_zero_attn : bool
        Append a key and a value of zeros.
    dropout_p, training : float, bool
        Dropout of the attention weights; only in training, the default.
    out_proj_weight, out_proj_bias : (O, E) array, (O,) array or None
    key_padding_mask : (N, S) array, optional
        bool: True = ignore. float: added to the scores. Unbatched (S,).
    attn_mask : array, optional
        (L, S), (N*H, L, S), or 4-D broadcastable to (N, H, L, S); bool: True = ignore. float: added to the scores.
    need_weights, average_attn_weights : bool
        Return the weights, after dropout, averaged over the heads.
    static_k, static_v : (N*H, S', D) arrays, optional
        In place of the projected keys and values; masks then count S' keys.
    is_causal : bool
        Query i sees keys j <= i, with or without other masks, all of which hold.

    Returns
    -------
    output : (L, N, O) array
    weights : (N, L, T) array, per head (N, H, L, T), or None
        T counts the appended keys; without N for unbatched inputs.

    Raises
    ------
    ValueError
        For shapes and sizes that do not fit; the message names them.
    TypeError
        For dtypes and array libraries that differ, and masks that are neither bool nor float.

    Notes
    -----
    After PyTorch 2.13. There a causal flag needs a mask beside it and may replace it, and rows without a key are NaN;
    here the flag masks, everything holds, and such rows give 0.
    """
    return forward_vjp(locals(), length_first=True)


multi_head_attention_forward = primal(multi_head_attention_forward_vjp)


def forward_vjp(p: dict[str, Any], length_first: bool) -> tuple[tuple[Array, Array | None], Backward]:
    """Result and backward of the call whose parameters these are, for either order of the axes."""
    call = _call(p, length_first)
    result = call.forward()

    def backward(
        grad_output: Array, grad_weights: Array | None = None, mask_gradients: bool = False
    ) -> dict[str, Array]:
        gradients = call.backward(grad_output, grad_weights, mask_gradients)
        return {_NAMES.get(name, name): x for name, x in gradients.items()}

    return result, backward


def _call(p: dict[str, Any], length_first: bool) -> StackedCall:
    separate = ("q_weight", "k_weight", "v_weight")
    unused = ("in_weight",) if p["use_separate_proj_weight"] else separate
    used = separate if p["use_separate_proj_weight"] else ("in_weight",)
    missing = [_NAMES[name] for name in (*used, "out_weight") if p[_NAMES[name]] is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} is None with use_separate_proj_weight={p['use_separate_proj_weight']}. "
            "Pass in_proj_weight, or all three separate weights and the flag."
        )
    return StackedCall.build(
        p["query"], p["key"], p["value"], {name: p[own] for name, own in _NAMES.items() if name not in unused},
        p["num_heads"], embed_dim=p["embed_dim_to_check"], length_first=length_first, average=p["average_attn_weights"],
        **{name: p[name] for name in ("attn_mask", "key_padding_mask", "is_causal", "add_zero_attn", "dropout_p",
                                      "training", "need_weights")},
    )  # fmt: skip


def scaled_dot_product_attention_vjp(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Array, Backward]:
    """``torch.nn.functional.scaled_dot_product_attention``; see `mha.scaled_dot_product_attention`.

    A boolean mask says True = attend. `is_causal` may stand beside a mask; both hold.
    """
    options = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    state = next_state() if dropout_p > 0 else None
    output, lse = core.scaled_dot_product_attention(query, key, value, *options, dropout_state=state, return_lse=True)

    def backward(
        grad_output: Array, grad_weights: Array | None = None, mask_gradients: bool = False
    ) -> dict[str, Array]:
        refuse_grad_weights(grad_weights)
        gradients = core.scaled_dot_product_attention_backward(
            grad_output, query, key, value, output, lse, *options, dropout_state=state, mask_gradients=mask_gradients
        )
        return {name: x for name, x in gradients._asdict().items() if x is not None}

    return output, backward


scaled_dot_product_attention = primal(scaled_dot_product_attention_vjp)
