"""What a caller may pass as a mask: sizes, shapes, dtypes and values, and the messages for everything else."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
Window = int | tuple[int, int] | None


@dataclass(frozen=True)
class Sizes:
    """The sizes that a mask is checked against, and how messages state them."""

    batch_shape: tuple[int, ...]
    heads: int
    queries: int
    keys: int

    @property
    def batch(self) -> int:
        return math.prod(self.batch_shape)

    @property
    def pairs(self) -> tuple[int, ...]:
        return (*self.batch_shape, self.heads, self.queries, self.keys)

    def __str__(self) -> str:
        return f"N={self.batch}, H={self.heads}, L={self.queries}, S={self.keys}"


def layer_pairs(mask: Array, sizes: Sizes, batched: bool) -> Array:
    """`mask` as a view that broadcasts to (N, H, L, S)."""
    batch, heads, queries, keys = sizes.pairs
    stacked = (batch * heads, queries, keys)
    if mask.shape == (queries, keys) or (mask.ndim == 4 and broadcasts(mask.shape, sizes.pairs)):
        return mask
    if mask.shape == stacked:
        return mask.reshape(sizes.pairs)
    hint = "Appended keys need no mask columns."
    if mask.shape == (batch, queries, keys):
        hint = f"Reshape a mask per sample to {(batch, 1, queries, keys)}."
    elif mask.shape[:1] == (2,) and mask.ndim == 2:
        hint = "For row ranges pass integers and maybe_cudnn_style_mask=True."
    name = "(N*H, L, S)" if batched else "(H, L, S)"
    raise ValueError(
        f"attn_mask has shape {mask.shape}, but with {sizes} it must be (L, S) = {(queries, keys)}, "
        f"{name} = {stacked}, or broadcast from 4 axes to (N, H, L, S) = {sizes.pairs}. {hint}"
    )


def attention_pairs(mask: Array, sizes: Sizes) -> Array:
    """`mask`, checked to broadcast to (*batch, H, L, S)."""
    if mask.ndim >= 2 and broadcasts(mask.shape, sizes.pairs):
        return mask
    raise ValueError(
        f"attn_mask has shape {mask.shape}, but with {sizes} it must have at least 2 axes and broadcast to "
        f"(*batch, H, L, S) = {sizes.pairs}. Give a mask per sample as (N, 1, L, S)."
    )


def padding_per_sample(mask: Array, sizes: Sizes, batched: bool) -> Array:
    """`mask` as (N, S)."""
    expected = (sizes.batch, sizes.keys) if batched else (sizes.keys,)
    if mask.shape != expected:
        name = "(N, S)" if batched else "(S,), there being no batch,"
        raise ValueError(
            f"key_padding_mask has shape {mask.shape}, but with {sizes} it must be {name} = {expected}. "
            "Appended keys need no mask columns."
        )
    return mask.reshape(sizes.batch, sizes.keys)


def lengths(name: str, value: Any, longest: int, sizes: Sizes, xp: ModuleType) -> Array:
    """int64 (N,), each between 0 and `longest`."""
    array = integers(name, value, (sizes.batch,), "(N,)", sizes, xp)
    if at_hand(xp) and bool(((array < 0) | (array > longest)).any()):
        raise ValueError(
            f"{name} has values outside 0 to {longest} with {sizes}. Give the number of valid rows of each sample."
        )
    return array


def offset(value: Any, sizes: Sizes, xp: ModuleType) -> int | Array:
    """The causal offset as an int or int64 (N,)."""
    if getattr(value, "ndim", 0) == 0 and not isinstance(value, (list, tuple)):
        return integer("causal_offset", value)
    return integers("causal_offset", value, (sizes.batch,), "an integer or (N,)", sizes, xp)


def integers(name: str, value: Any, shape: tuple[int, ...], words: str, sizes: Sizes, xp: ModuleType) -> Array:
    """An array of `xp`, or a list, as a contiguous int64 array of this shape."""
    if isinstance(value, (list, tuple)):
        value = xp.asarray(value) if value else xp.zeros(0, np.int64)
    check_library(name, value, xp)
    if value.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {value.dtype}. Its values count rows: pass integers.")
    if value.shape != shape:
        raise ValueError(
            f"{name} has shape {value.shape}, but with {sizes} it must be {words} = {shape}. "
            "Offsets and lengths go one per sample, key ranges one per query."
        )
    array: Array = value.astype(np.int64, order="C")
    return array


def integer(name: str, value: Any) -> int:
    """`value` as an int; a flag is no number."""
    if not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} is {value!r}, a {type(value).__name__}. Pass an integer.")


def reach(window: Window, is_causal: bool) -> tuple[int, int]:
    """(left, right) of the window and causality together."""
    if window is None:
        left, right = -1, -1
    elif isinstance(window, (tuple, list)):
        if len(window) != 2:
            raise ValueError(f"window {window!r} has {len(window)} numbers. Pass w for (w, 0), or (left, right).")
        left, right = integer("window[0]", window[0]), integer("window[1]", window[1])
    else:
        left, right = integer("window", window), 0
    if min(left, right) < -1:
        raise ValueError(f"window ({left}, {right}) reaches below -1. Pass sizes of at least 0, or -1 for unlimited.")
    return left, 0 if is_causal else right


def checked_dtype(name: str, mask: Array, dtype: DTypeLike, true_means: str, xp: ModuleType) -> Array:
    """`mask` if it is boolean or a float of a dtype that can be added, copied where kernels cannot index it."""
    check_library(name, mask, xp)
    allowed = np.dtype(dtype).newbyteorder("="), np.dtype(np.float32)
    if mask.dtype != np.bool_ and mask.dtype.newbyteorder("=") not in allowed:
        raise TypeError(
            f"{name} has dtype {mask.dtype}, but with a query of dtype {allowed[0]} it must be bool "
            f"(True = {true_means}), {' or '.join(dict.fromkeys(map(str, allowed)))}. Convert it with mask.astype(...)."
        )
    whole = all(stride % mask.itemsize == 0 for stride in mask.strides)
    if xp is not np or (whole and mask.flags.aligned and mask.dtype.isnative):
        return mask
    return np.array(mask, mask.dtype.newbyteorder("="), order="C")


def check_library(name: str, value: Any, xp: ModuleType) -> None:
    """TypeError unless `value` is an array of `xp`."""
    if not isinstance(value, xp.ndarray):
        raise TypeError(
            f"{name} is a {type(value).__name__}, not a {xp.__name__} array. Masks live in the query's library."
        )


def at_hand(xp: ModuleType) -> bool:
    """Whether the values of a library's arrays are looked at: a device's are not, for that would wait for it."""
    return xp is np


def broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of this shape broadcasts to exactly `target`."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(n in (1, m) for n, m in pairs)
