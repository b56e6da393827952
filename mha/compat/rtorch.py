"""R torch's multi-head attention on NumPy and CuPy arrays: its names, argument order and defaults.

R's ``layer <- nn_multihead_attention(...)``, ``out <- layer(...)``, ``out[[1]]`` is here ``layer =
nn_multihead_attention(...)``, ``out = layer(...)``, ``out[0]``. Axes count from 0; numbers may be R's, 8.0 for 8.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from mha.compat import torch
from mha.compat.differentiable import Backward, primal
from mha.compat.torch.functional import forward_vjp
from mha.masks import stacked_pairs

Array = NDArray[Any]

__all__ = ["nn_multihead_attention", "nnf_multi_head_attention_forward", "nnf_multi_head_attention_forward_vjp"]


def nnf_multi_head_attention_forward_vjp(
    query: Array,
    key: Array,
    value: Array,
    embed_dim_to_check: float,
    num_heads: float,
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
    avg_weights: bool = True,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Array | None = None,
    k_proj_weight: Array | None = None,
    v_proj_weight: Array | None = None,
    static_k: Array | None = None,
    static_v: Array | None = None,
    batch_first: bool = False,
) -> tuple[tuple[Array, Array | None], Backward]:
    """R torch's ``nnf_multi_head_attention_forward``.

    Parameters
    ----------
    query, key, value : arrays
        (L, N, E), (S, N, kdim) and (S, N, vdim); with `batch_first` N before the length.
    key_padding_mask : (N, S) array, optional
        bool or uint8: non-zero = ignore. float: added to the scores.
    attn_mask : array, optional
        Broadcastable to (L, S) or (N*H, L, S), of the same kinds.
    avg_weights : bool
        Average the returned weights over the heads.
    others :
        As in `mha.compat.torch.multi_head_attention_forward`.

    Returns
    -------
    output : array, as the query
    weights : (N, L, T) array, per head (N, H, L, T), or None

    Raises
    ------
    TypeError, ValueError
        As `mha.compat.torch.multi_head_attention_forward`.

    Notes
    -----
    After mlverse/torch 0.17. There `add_zero_attn` fails, bytes are added to the scores, and rows without a key are
    NaN; here they work as documented, and such rows give 0.
    """
    arguments: dict[str, Any] = dict(locals())
    arguments |= {name: whole(name, arguments[name]) for name in ("embed_dim_to_check", "num_heads")}
    arguments |= {"average_attn_weights": avg_weights, "is_causal": False}
    arguments |= _masks(attn_mask, key_padding_mask, query, arguments["num_heads"], batch_first)
    result, own_backward = forward_vjp(arguments, length_first=not batch_first)

    def backward(
        grad_output: Array, grad_weights: Array | None = None, mask_gradients: bool = False
    ) -> dict[str, Array]:
        gradients = own_backward(grad_output, grad_weights, mask_gradients)
        if attn_mask is not None and "attn_mask" in gradients:
            gradients["attn_mask"] = gradients["attn_mask"].reshape(attn_mask.shape)
        return gradients

    return result, backward


nnf_multi_head_attention_forward = primal(nnf_multi_head_attention_forward_vjp)


class nn_multihead_attention(torch.MultiheadAttention):
    """R torch's ``nn_multihead_attention``.

    Parameters
    ----------
    embed_dim, num_heads : number
        E and H; E must be divisible by H.
    dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype :
        As in `mha.compat.torch.MultiheadAttention`; R has no argument for the last two.

    Notes
    -----
    After mlverse/torch 0.17. Parameters and state dict are PyTorch's, gradients by `backward` as there.
    """

    def __init__(
        self,
        embed_dim: float,
        num_heads: float,
        dropout: float = 0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: float | None = None,
        vdim: float | None = None,
        batch_first: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            whole("embed_dim", embed_dim), whole("num_heads", num_heads), dropout, bias, add_bias_kv, add_zero_attn,
            None if kdim is None else whole("kdim", kdim), None if vdim is None else whole("vdim", vdim), batch_first,
            device, dtype,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        self._reset_parameters()

    def __call__(  # type: ignore[override]
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Array | None = None,
        need_weights: bool = True,
        attn_mask: Array | None = None,
        avg_weights: bool = True,
    ) -> tuple[Any, Any]:
        """Run the layer; masks as in `nnf_multi_head_attention_forward`, the rest as PyTorch's.

        Returns
        -------
        output : array, as the query
        weights : (N, L, T) array, per head (N, H, L, T), or None
        """
        if not isinstance(query, (list, tuple)):
            masks = _masks(attn_mask, key_padding_mask, query, self.num_heads, self.batch_first)
            attn_mask, key_padding_mask = masks["attn_mask"], masks["key_padding_mask"]
        return super().__call__(query, key, value, key_padding_mask, need_weights, attn_mask, avg_weights)

    forward = __call__  # type: ignore[assignment]


def whole(name: str, x: float) -> int:
    """R's numbers are floating: 8.0 is 8.

    Raises
    ------
    ValueError
        If there is a fraction.
    """
    if int(x) != x:
        raise ValueError(f"{name} is {x}, no whole number. Round it.")
    return int(x)


def _masks(
    attn_mask: Array | None, key_padding_mask: Array | None, query: Array, heads: int, batch_first: bool
) -> dict[str, Array | None]:
    """Bytes as flags, and a pair mask with four axes."""
    batch = query.shape[not batch_first] if query.ndim == 3 else 1
    return {
        "attn_mask": stacked_pairs(_flags(attn_mask), batch, heads),
        "key_padding_mask": _flags(key_padding_mask),
    }


def _flags(mask: Array | None) -> Array | None:
    return mask != 0 if mask is not None and mask.dtype == "u1" else mask
