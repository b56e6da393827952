"""``ivy.multi_head_attention``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from numpy.typing import NDArray

from mha.compat.containers import Selection, run
from mha.compat.differentiable import Backward, primal
from mha.compat.stacked import StackedCall
from mha.masks import stacked_pairs
from mha.optional import array_module

Array = NDArray[Any]

#: Parameters by the names that `StackedCall` has for them.
NAMES = {
    "in_weight": "in_proj_weights", "q_weight": "q_proj_weights", "k_weight": "k_proj_weights",
    "v_weight": "v_proj_weights", "in_bias": "in_proj_bias", "out_weight": "out_proj_weights",
    "out_bias": "out_proj_bias", "bias_k": "bias_k", "bias_v": "bias_v", "static_k": "static_k",
    "static_v": "static_v",
}  # fmt: skip
_ARRAYS = ("query", "key", "value", "attention_mask", "key_padding_mask", "out", *NAMES.values())


def multi_head_attention_vjp(
    query: Any,
    /,
    *,
    key: Any = None,
    value: Any = None,
    batch_first: bool = True,
    num_heads: int = 8,
    scale: float | None = None,
    attention_mask: Any = None,
    in_proj_weights: Any = None,
    q_proj_weights: Any = None,
    k_proj_weights: Any = None,
    v_proj_weights: Any = None,
    out_proj_weights: Any = None,
    in_proj_bias: Any = None,
    out_proj_bias: Any = None,
    is_causal: bool = False,
    key_padding_mask: Any = None,
    bias_k: Any = None,
    bias_v: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    add_zero_attn: bool = False,
    return_attention_weights: bool = False,
    average_attention_weights: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    out: Any = None,
    key_chains: Iterable[str] | None = None,
    to_apply: bool = True,
    prune_unapplied: bool = False,
    map_sequences: bool = False,
) -> tuple[Any, Backward]:
    """``ivy.multi_head_attention``.

    Parameters
    ----------
    query : (N, L, Q) array
        With ``batch_first=False`` (L, N, Q); unbatched (L, Q).
    key, value : (N, S, K) and (N, S, V) arrays, optional
        The query if both are absent.
    num_heads : int
        H.
    scale : float, optional
        Factor on the scores; None is (E // H) ** -0.5, 0 is honoured.
    attention_mask : array, optional
        Broadcastable to (L, S) or (N*H, L, S); bool: True = ignore. Of the query's dtype: added to the scores.
    in_proj_weights : (3*E, Q) array, optional
        Rows of query, key and value; goes before q_proj_weights (E, Q), k_proj_weights (E, K) and v_proj_weights
        (E, V), of which all or none count. Without weights the inputs are divided into heads as they are.
    in_proj_bias : (3*E,) array, optional
    out_proj_weights, out_proj_bias : (O, E) and (O,) arrays, optional
        Biases without weights have no effect.
    is_causal : bool
        Query i sees keys j <= i; takes the place of `attention_mask`.
    key_padding_mask : (N, S) or (S,) bool array, optional
        True = ignore; holds with `is_causal` too.
    bias_k, bias_v : (E,) or (1, 1, E) arrays, optional
        One key and value appended to every sample's, always visible; one without the other has no effect.
    static_k, static_v : (N*H, S', E // H) arrays, optional
        In place of the projected keys and values; masks then count S' keys.
    add_zero_attn : bool
        Append a key and a value of zeros, after `bias_k` and `bias_v`.
    return_attention_weights, average_attention_weights : bool
        Return the weights, after dropout, averaged over the heads.
    dropout, training : float, bool
        Dropout of the attention weights; only in training.
    out : array, optional
        Takes the output and is returned.
    key_chains, to_apply, prune_unapplied, map_sequences :
        For nested dicts: which leaves, as "a/b", the function is (or with ``to_apply=False`` is not) for; leave the
        others out, in whose place else the first dict's values stand; treat lists as containers too.

    Returns
    -------
    output : array, as the query, of width O or E
    weights : (N, L, T) array, per head (N, H, L, T), if asked for
        T counts the appended keys; without N for unbatched inputs. With nested dicts both are nested dicts.

    Raises
    ------
    ValueError
        For shapes and sizes that do not fit, one of key and value alone, and dicts with different keys.
    TypeError
        For dtypes and array libraries that differ.

    Notes
    -----
    After Ivy 1.0, as documented. There batches of more than one are mixed up, ``is_causal`` without a mask does
    nothing, a scale of 0 is the default, and rows without a key are NaN (here 0).
    """
    given = {"query": query} | {name: x for name, x in locals().items() if name in _ARRAYS and x is not None}
    options = {
        "batch_first": batch_first, "num_heads": num_heads, "scale": scale, "is_causal": is_causal,
        "add_zero_attn": add_zero_attn, "need_weights": return_attention_weights,
        "average": average_attention_weights, "dropout_p": dropout, "training": training,
    }  # fmt: skip
    (output, weights), backward = run(
        lambda **arrays: _one(arrays, options), given, Selection(key_chains, to_apply, prune_unapplied, map_sequences)
    )
    return (output, weights) if return_attention_weights else output, backward


multi_head_attention = primal(multi_head_attention_vjp)


def _one(arrays: dict[str, Array], options: dict[str, Any]) -> tuple[tuple[Array, Array | None], Backward]:
    """One call with arrays only."""
    query, out, mask = arrays["query"], arrays.get("out"), arrays.get("attention_mask")
    if ("key" in arrays) != ("value" in arrays):
        shapes = {name: x.shape for name, x in arrays.items() if name in ("query", "key", "value")}
        raise ValueError(f"only one of key and value is given: {shapes}. Give both, or neither for self-attention.")
    array_module(*arrays.values())
    _check_masks(query, mask, arrays.get("key_padding_mask"))
    length_first = not options["batch_first"]
    batch = 1 if query.ndim == 2 else query.shape[length_first]
    padding = arrays.get("key_padding_mask")
    if padding is not None and padding.ndim == 1 and query.ndim == 3:
        padding = array_module(padding).broadcast_to(padding, (batch, *padding.shape))
    call = StackedCall.build(
        query, arrays.get("key", query), arrays.get("value", query), _parameters(arrays),
        attn_mask=None if options["is_causal"] else stacked_pairs(mask, batch, options["num_heads"]),
        key_padding_mask=padding, length_first=length_first,
        **{name: x for name, x in options.items() if name != "batch_first"},
    )  # fmt: skip
    output, weights = call.forward()
    if out is not None:
        if out.shape != output.shape or out.dtype != output.dtype:
            raise ValueError(
                f"out is {out.dtype} {out.shape}, the output {output.dtype} {output.shape}. Make them alike."
            )
        out[...] = output
        output = out

    def backward(
        grad_output: Array, grad_weights: Array | None = None, mask_gradients: bool = False
    ) -> dict[str, Array]:
        made = call.backward(grad_output, grad_weights, mask_gradients)
        if "key" not in arrays:
            made["query"] = made["query"] + made.pop("key") + made.pop("value")
        if mask is not None and "attn_mask" in made:
            made["attention_mask"] = made.pop("attn_mask").reshape(mask.shape)
        return {NAMES.get(name, name): x for name, x in made.items()}

    return (output, weights), backward


def _parameters(arrays: dict[str, Array]) -> dict[str, Array]:
    """Those that have an effect, by the names of `StackedCall`."""
    held = {name: arrays[own] for name, own in NAMES.items() if own in arrays}
    separate = {"q_weight", "k_weight", "v_weight"}
    if "in_weight" in held or not separate <= held.keys():
        held = {name: x for name, x in held.items() if name not in separate}
    if "in_weight" not in held and "q_weight" not in held:
        held.pop("in_bias", None)
    if "out_weight" not in held:
        held.pop("out_bias", None)
    if not {"bias_k", "bias_v"} <= held.keys():
        held = {name: x for name, x in held.items() if name not in ("bias_k", "bias_v")}
    return held


def _check_masks(query: Array, mask: Array | None, padding: Array | None) -> None:
    """bool, or for the pairs the query's dtype exactly."""
    if mask is not None and mask.dtype not in ("bool", query.dtype):
        raise TypeError(
            f"attention_mask {mask.shape} has dtype {mask.dtype}, but with a query of dtype {query.dtype} it must be "
            "bool or of that dtype. Convert it with astype."
        )
    if padding is not None and padding.dtype != "bool":
        raise TypeError(
            f"key_padding_mask {padding.shape} has dtype {padding.dtype}, not bool. Convert it with mask != 0."
        )
