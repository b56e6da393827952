"""User masks -> `MaskSpec`: the only place that interprets a mask.

A spec says which keys each query sees and what is added to its scores, without ever building or copying anything of
size L x S. Letters: N batch (the product of all batch axes), H query heads, L queries, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mha import mask_checks as check
from mha.mask_checks import Sizes, Window

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class MaskSpec:
    """Which scores are visible and what is added to them; everything given holds at once.

    Query i of sample n stands at position p = i + offset and sees the keys ``p - left <= j <= p + right``, further
    limited by each field that is not None. A bias of -inf hides; a finite bias never does. A query that sees no key is
    an empty row: output 0, log-sum-exp -inf, gradients 0.
    """

    #: Reach of the window before and after a query's position; -1 = unlimited. Causal is ``right = 0``.
    left: int = -1
    right: int = -1
    #: int, or int64 (N,).
    offset: Any = 0
    #: int64 (2, L): every query i sees only ``row_ranges[0, i] <= j < row_ranges[1, i]``.
    row_ranges: Array | None = None
    #: int64 (N,): keys from here on are hidden; queries from here on are empty rows, appended keys included.
    key_lengths: Array | None = None
    query_lengths: Array | None = None
    #: bool (N, S), True = attend; float (N, S), added to the scores.
    key_keep: Array | None = None
    key_bias: Array | None = None
    #: bool, a broadcast view (*batch, H, L, S) of the caller's mask in its own polarity: `pair_hides` is what hides.
    pair_keep: Array | None = None
    pair_hides: bool = False
    #: float, a broadcast view (*batch, H, L, S), added to the scores.
    pair_bias: Array | None = None
    #: Appended keys behind the S above: every query that is not past its query length sees them.
    extra: int = 0

    def may_leave_out(self, queries: int, keys: int) -> bool:
        """Whether there may be a query that sees none of `keys`, or one of them that no query sees."""
        given = (self.row_ranges, self.key_lengths, self.query_lengths, self.key_keep, self.key_bias, self.pair_keep,
                 self.pair_bias)  # fmt: skip
        if any(x is not None for x in given) or not isinstance(self.offset, int) or 0 in (queries, keys):
            return True
        first, last = self.offset, queries - 1 + self.offset
        if self.right >= 0 and (first + self.right < 0 or last + self.right < keys - 1):
            return True
        return self.left >= 0 and (first - self.left > 0 or last - self.left > keys - 1)


def for_multi_head_attention(
    attn_mask: Array | None,
    key_padding_mask: Array | None,
    *,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dtype: DTypeLike,
    is_causal: bool = False,
    maybe_cudnn_style_mask: bool = False,
    window: Window = None,
    causal_offset: Any = 0,
    extra: int = 0,
    batched: bool = True,
    xp: ModuleType = np,
) -> MaskSpec:
    """Masks of a multi-head attention layer, where True = ignore (MegEngine, PyTorch, R torch and Ivy).

    Parameters
    ----------
    attn_mask : array, optional
        (L, S), (N*H, L, S), or 4-D and broadcastable to (N, H, L, S); bool, or float to be added to the scores.
    key_padding_mask : array, optional
        (N, S), without a batch (S,); bool or float.
    batch, heads, queries, keys : int
        N (1 without a batch), H, L, and S without the appended keys.
    dtype : dtype
        The query's; a float mask has this dtype or float32.
    is_causal : bool
        Query i sees only keys ``j <= i + causal_offset``; `causal_offset` is an int or an integer array (N,).
    maybe_cudnn_style_mask : bool
        Both hold integers: attn_mask (2, L) = first key and end per query, key_padding_mask (2, N) = both lengths.
    window : int or (int, int), optional
        w = (w, 0), or (left, right); -1 = unlimited.
    extra, batched : int, bool
        Number of appended keys (bias_k, zero); whether the inputs had a batch axis.

    Raises
    ------
    TypeError
        For a mask that is no array of `xp` or has a wrong dtype, or a non-integer window, offset or length.
    ValueError
        For a wrong shape, and for values out of range unless the arrays are a device's: kernels clamp them.
    """
    sizes = Sizes((batch,), heads, queries, keys)
    left, right = check.reach(window, is_causal)
    offset = check.offset(causal_offset, sizes, xp)
    fields: dict[str, Any] = {"left": left, "right": right, "offset": offset, "extra": extra}
    if maybe_cudnn_style_mask:
        return MaskSpec(**fields, **_cudnn_masks(attn_mask, key_padding_mask, sizes, xp))
    if attn_mask is not None:
        attn_mask = check.checked_dtype("attn_mask", attn_mask, dtype, "ignore", xp)
        pairs = xp.broadcast_to(check.layer_pairs(attn_mask, sizes, batched), sizes.pairs)
        fields.update({"pair_keep": pairs, "pair_hides": True} if pairs.dtype == np.bool_ else {"pair_bias": pairs})
    if key_padding_mask is not None:
        padding = check.checked_dtype("key_padding_mask", key_padding_mask, dtype, "ignore", xp)
        padding = xp.ascontiguousarray(check.padding_per_sample(padding, sizes, batched))
        fields.update({"key_keep": ~padding} if padding.dtype == np.bool_ else {"key_bias": padding})
    return MaskSpec(**fields)


def float_masks(attn_mask: Array | None, key_padding_mask: Array | None, sizes: Sizes) -> dict[str, Array]:
    """The float ones of a layer's masks as views of four axes that broadcast to (N, H, L, S), to be differentiated."""
    views = {}
    if key_padding_mask is not None and key_padding_mask.dtype.kind not in "biu":
        views["key_padding_mask"] = key_padding_mask.reshape(sizes.batch, 1, 1, sizes.keys)
    if attn_mask is not None and attn_mask.dtype.kind not in "biu":
        pairs = check.layer_pairs(attn_mask, sizes, True)
        views["attn_mask"] = pairs[(None,) * (4 - pairs.ndim)]
    return views


def stacked_pairs(mask: Array | None, batch: int, heads: int) -> Array | None:
    """A mask that broadcasts to (L, S) or (N*H, L, S), as R torch and Ivy take it: one that does to (N, H, L, S)."""
    if mask is None or mask.ndim not in (2, 3):
        return mask
    if mask.ndim == 2:
        return mask[None, None]
    if mask.shape[0] == 1:
        return mask[:, None]
    return mask.reshape(batch, heads, *mask.shape[1:]) if mask.shape[0] == batch * heads else mask


def for_scaled_dot_product(
    attn_mask: Array | None,
    *,
    batch_shape: tuple[int, ...],
    heads: int,
    queries: int,
    keys: int,
    dtype: DTypeLike,
    is_causal: bool = False,
    window: Window = None,
    causal_offset: Any = 0,
    key_lengths: Any = None,
    query_lengths: Any = None,
    xp: ModuleType = np,
) -> MaskSpec:
    """Masks of scaled dot-product attention, where True = attend (PyTorch and Paddle).

    Parameters
    ----------
    attn_mask : array, optional
        At least 2-D and broadcastable to (*batch_shape, H, L, S); bool, or float to be added to the scores.
    batch_shape : tuple of int
        The batch axes; N is their product, its order row-major.
    key_lengths, query_lengths : integer array (N,), optional
        Keys from here on are hidden; queries from here on are empty rows.

    The other parameters and the errors are those of `for_multi_head_attention`.
    """
    sizes = Sizes(tuple(batch_shape), heads, queries, keys)
    left, right = check.reach(window, is_causal)
    fields: dict[str, Any] = {"left": left, "right": right, "offset": check.offset(causal_offset, sizes, xp)}
    if key_lengths is not None:
        fields["key_lengths"] = check.lengths("key_lengths", key_lengths, keys, sizes, xp)
    if query_lengths is not None:
        fields["query_lengths"] = check.lengths("query_lengths", query_lengths, queries, sizes, xp)
    if attn_mask is not None:
        attn_mask = check.checked_dtype("attn_mask", attn_mask, dtype, "attend", xp)
        pairs = check.attention_pairs(attn_mask, sizes)
        if pairs.dtype == np.bool_ and pairs.shape[-3:-1] in ((1, 1), (1,)):
            # Padding in the shape of an attention mask: one row for all heads and queries of a sample.
            rows = xp.broadcast_to(pairs.reshape(*pairs.shape[:-3], pairs.shape[-1]), (*batch_shape, keys))
            fields["key_keep"] = xp.ascontiguousarray(rows).reshape(sizes.batch, keys)
        else:
            pairs = xp.broadcast_to(pairs, sizes.pairs)
            named = {"pair_keep": pairs, "pair_hides": False}
            fields.update(named if pairs.dtype == np.bool_ else {"pair_bias": pairs})
    return MaskSpec(**fields)


def materialise(
    spec: MaskSpec,
    batch_shape: tuple[int, ...],
    heads: int,
    queries: int,
    keys: int,
    dtype: DTypeLike = np.float64,
    xp: ModuleType = np,
) -> tuple[NDArray[np.bool_], Array | None]:
    """Expand a spec to full size, for the reference implementation and tests.

    Returns
    -------
    visible : bool array (*batch_shape, H, L, S + extra)
    bias : array of `dtype` and of the same shape, or None
        Finite where the masks are finite, however low their sum; 0 where they hide.
    """
    shape = (*batch_shape, heads, queries, keys)
    per_sample = (*batch_shape, 1, 1, keys)
    rows = _rows_within_length(spec, shape, xp)
    visible = xp.broadcast_to(_in_ranges(spec, shape, xp) & rows, shape)
    if spec.key_keep is not None:
        visible = visible & spec.key_keep.reshape(per_sample)
    if spec.pair_keep is not None:
        visible = visible & (spec.pair_keep != spec.pair_hides)
    bias = None
    padding = None if spec.key_bias is None else spec.key_bias.reshape(per_sample)
    for part in (padding, spec.pair_bias):
        if part is not None:
            visible = visible & (part != -np.inf)
            bias = part.astype(dtype) if bias is None else bias + part.astype(dtype)
    always = xp.broadcast_to(rows, (*shape[:-1], spec.extra))
    if bias is not None:
        # Two finite minima may add up to -inf, which would hide.
        bias = xp.where(visible, xp.maximum(bias, np.finfo(dtype).min), 0).astype(dtype)
        bias = xp.concatenate([bias, xp.zeros(always.shape, dtype)], axis=-1)
    return xp.concatenate([visible, always], axis=-1), bias


def _rows_within_length(spec: MaskSpec, shape: tuple[int, ...], xp: ModuleType) -> Array:
    """Bool (*batch | 1s, 1, L, 1): False for rows past their sample's query length."""
    *batch_shape, _, queries, _ = shape
    within: Array = xp.ones((queries, 1), bool)
    if spec.query_lengths is not None:
        within = xp.arange(queries).reshape(queries, 1) < spec.query_lengths.reshape(*batch_shape, 1, 1, 1)
    return within


def _in_ranges(spec: MaskSpec, shape: tuple[int, ...], xp: ModuleType) -> Array:
    """Bool, broadcastable to `shape`: the window, the row ranges and the key lengths."""
    *batch_shape, _, queries, keys = shape
    query, key = xp.arange(queries).reshape(queries, 1), xp.arange(keys)
    offset = spec.offset if isinstance(spec.offset, int) else spec.offset.reshape(*batch_shape, 1, 1, 1)
    position = query + offset
    inside: Array = xp.ones((queries, keys), bool)
    if spec.left >= 0:
        inside = inside & (key >= position - spec.left)
    if spec.right >= 0:
        inside = inside & (key <= position + spec.right)
    if spec.row_ranges is not None:
        low, high = spec.row_ranges.reshape(2, queries, 1)
        inside = inside & (key >= low) & (key < high)
    if spec.key_lengths is not None:
        inside = inside & (key < spec.key_lengths.reshape(*batch_shape, 1, 1, 1))
    return inside


def _cudnn_masks(rows: Any, samples: Any, sizes: Sizes, xp: ModuleType) -> dict[str, Any]:
    """The fields of MegEngine's integer masks: key ranges of the queries, lengths of the samples."""
    if rows is None or samples is None:
        missing = " and ".join(n for n, m in (("attn_mask", rows), ("key_padding_mask", samples)) if m is None)
        raise ValueError(
            f"maybe_cudnn_style_mask=True needs both masks, but {missing} is None. "
            "Pass key ranges (2, L) as attn_mask and lengths (2, N) as key_padding_mask."
        )
    ranges = check.integers("attn_mask", rows, (2, sizes.queries), "(2, L)", sizes, xp)
    samples = check.integers("key_padding_mask", samples, (2, sizes.batch), "(2, N)", sizes, xp)
    low, high = ranges
    if check.at_hand(xp) and bool(((low < 0) | (low > high) | (high > sizes.keys)).any()):
        raise ValueError(
            f"attn_mask of shape {ranges.shape} holds a range that is not 0 <= first <= end <= S = {sizes.keys}. "
            "Its rows are the first key of each query and the end, exclusive."
        )
    return {
        "row_ranges": ranges,
        "query_lengths": check.lengths("key_padding_mask[0]", samples[0], sizes.queries, sizes, xp),
        "key_lengths": check.lengths("key_padding_mask[1]", samples[1], sizes.keys, sizes, xp),
    }
