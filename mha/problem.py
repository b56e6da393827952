"""`AttentionProblem`: the only validator of shapes, dtypes and devices in front of the kernels.

Everything below it trusts what it holds. Shapes: query (*batch, H, L, D), key (*batch, Hk, T, D), value
(*batch, Hk, T, Dv), where T counts appended keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha.masks import MaskSpec
from mha.optional import array_module, bfloat16
from mha.random import DropoutState, keep_scale

Array = NDArray[Any]

#: dtype -> the one it is computed in.
COMPUTING: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.float32): np.dtype(np.float32),
    np.dtype(np.float64): np.dtype(np.float64),
    np.dtype(np.float16): np.dtype(np.float32),
}
if bfloat16 is not None:
    COMPUTING[bfloat16] = np.dtype(np.float32)

#: Sizes and strides are 64-bit; what does not fit an index is refused before anything is allocated.
_MOST_ELEMENTS = 2**59


@dataclass(frozen=True)
class Dropout:
    """Dropout of the attention weights: probability and what the mask is derived from.

    `keep` is a mask given outright, (*batch, H, L, T); only the reference backend takes one. `kept` is the factor of
    kept elements, None for 1 / (1 - p); with p = 0 and a factor everything is scaled.
    """

    p: float
    state: DropoutState | None = None
    keep: Array | None = None
    kept: float | None = None

    @property
    def factor(self) -> float:
        """Of kept elements."""
        return keep_scale(self.p) if self.kept is None else self.kept


class Norm(NamedTuple):
    """Layer norm over the last axis: (x - mean) / sqrt(variance + epsilon) * scale + bias, the variance biased.

    scale, bias : (E,) arrays or None, which are 1 and 0
    """

    scale: Array | None
    bias: Array | None
    epsilon: float


class RowStatistics(NamedTuple):
    """What turns a score back into a probability, (*batch, H, L) each: exp(score - shift) * scale; None is 1.

    The forward gives maximum and 1 / sum. The log-sum-exp alone serves too, at the price of its rounding.
    """

    shift: Array
    scale: Array | None = None


@dataclass(frozen=True)
class Sizes:
    """The sizes of a problem: N, H, Hk, L, T, D, Dv, and how many of the T keys are appended ones."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    v_head_dim: int
    extra: int = 0

    @property
    def rows(self) -> int:
        """Query rows that share a key head."""
        return self.heads // max(self.kv_heads, 1) * self.queries

    @property
    def flops(self) -> int:
        """Floating-point operations of the forward, nothing hidden."""
        return 2 * self.batch * self.heads * self.queries * self.keys * (self.head_dim + self.v_head_dim)


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """One call of the attention core, validated."""

    query: Array
    key: Array
    value: Array
    mask: MaskSpec
    scale: float
    softcap: float | None = None
    dropout: Dropout | None = None

    @classmethod
    def build(
        cls,
        query: Array,
        key: Array,
        value: Array,
        mask: MaskSpec,
        scale: float | None = None,
        softcap: float | None = None,
        dropout: Dropout | None = None,
    ) -> AttentionProblem:
        """Check everything that the mask's own builder has not checked.

        Raises
        ------
        TypeError
            For arrays of different libraries, and dtypes that differ or are not float16, bfloat16, float32, float64.
        ValueError
            For shapes that do not fit each other, and options out of range.
        """
        named = {"query": query, "key": key, "value": value}
        xp = array_module(*named.values())
        check_dtypes(named)
        _check_shapes(query, key, value)
        return cls(
            query=usable(query, xp),
            key=usable(key, xp),
            value=usable(value, xp),
            mask=mask,
            scale=checked_scale(scale, query.shape[-1]),
            softcap=checked_softcap(softcap),
            dropout=dropout if dropout is not None and (dropout.p > 0 or dropout.factor != 1) else None,
        )

    @cached_property
    def xp(self) -> ModuleType:
        """The arrays' library."""
        return array_module(self.query)

    @cached_property
    def batch_shape(self) -> tuple[int, ...]:
        """The broadcast batch axes."""
        batches = [x.shape[:-3] for x in (self.query, self.key, self.value)]
        return batches[0] if batches[0] == batches[1] == batches[2] else np.broadcast_shapes(*batches)

    @property
    def batch(self) -> int:
        """N"""
        return math.prod(self.batch_shape)

    @property
    def heads(self) -> int:
        """H"""
        return self.query.shape[-3]

    @property
    def kv_heads(self) -> int:
        """Hk"""
        return self.key.shape[-3]

    @property
    def queries(self) -> int:
        """L"""
        return self.query.shape[-2]

    @property
    def keys(self) -> int:
        """T, appended keys included"""
        return self.key.shape[-2]

    @property
    def head_dim(self) -> int:
        """D"""
        return self.query.shape[-1]

    @property
    def v_head_dim(self) -> int:
        """Dv"""
        return self.value.shape[-1]

    @property
    def sizes(self) -> Sizes:
        """What plans are made from."""
        lengths = self.queries, self.keys, self.head_dim, self.v_head_dim
        return Sizes(self.batch, self.heads, self.kv_heads, *lengths, self.mask.extra)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the arrays and the results."""
        return self.query.dtype

    @property
    def computing(self) -> np.dtype[Any]:
        """Of the computation, the log-sum-exp included."""
        return COMPUTING[self.dtype]


def check_dtypes(named: dict[str, Array]) -> None:
    """All of one floating dtype that the kernels know; byte order aside."""
    dtypes = {x.dtype for x in named.values()}
    if len(dtypes) == 1 and dtypes <= COMPUTING.keys():
        return
    dtypes = {dtype.newbyteorder("=") for dtype in dtypes}
    unknown = [str(dtype) for dtype in dtypes if dtype not in COMPUTING]
    listed = ", ".join(f"{name} {x.shape} {x.dtype}" for name, x in named.items())
    if unknown:
        known = ", ".join(map(str, COMPUTING))
        hint = "" if bfloat16 is not None else " bfloat16 needs the package ml_dtypes."
        raise TypeError(f"dtype {' and '.join(unknown)} ({listed}) is not one of {known}. Convert with astype.{hint}")
    if len(dtypes) > 1:
        raise TypeError(f"dtypes differ: {listed}. Convert them to one dtype with astype.")


def shapes_of(**named: Array) -> str:
    """The arrays' shapes, as messages state them."""
    return ", ".join(f"{name} {x.shape}" for name, x in named.items())


def _check_shapes(query: Array, key: Array, value: Array) -> None:
    """(..., H, L, D), (..., Hk, S, D) and (..., Hk, S, Dv) that fit each other."""
    fault = _shape_fault(query, key, value)
    if fault:
        raise ValueError(f"{shapes_of(query=query, key=key, value=value)}: {fault}")


def _shape_fault(query: Array, key: Array, value: Array) -> str | None:
    if min(query.ndim, key.ndim, value.ndim) < 3:
        return "each needs a head axis, (..., H, L, D). Add one with x[None]."
    if query.shape[-1] != key.shape[-1]:
        return "query and key must have the same last size D. Check their last axes."
    if query.shape[-1] < 1 or value.shape[-1] < 1:
        return "head sizes D and Dv must be at least 1. Check the last axes."
    if key.shape[-2] != value.shape[-2]:
        return "key and value must have the same length S. Check their axis -2."
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if kv_heads != value.shape[-3] or (heads % kv_heads if kv_heads else heads):
        return (
            f"key and value must have equally many heads (axis -3), a divisor of the query's {heads}. "
            "Check the head axes."
        )
    batches = query.shape[:-3], key.shape[:-3], value.shape[:-3]
    try:
        batch = batches[0] if batches[0] == batches[1] == batches[2] else np.broadcast_shapes(*batches)
    except ValueError:
        return f"the batch axes {', '.join(map(str, batches))} do not broadcast. Make each pair equal or 1."
    rows = math.prod(batch) * max(heads, 1) * max(query.shape[-2], key.shape[-2])
    if rows * max(query.shape[-1], value.shape[-1]) > _MOST_ELEMENTS:
        return "broadcast, that is more elements than a 64-bit index reaches. Split the batch."
    return None


def checked_scale(scale: float | None, head_dim: int) -> float:
    """None is D ** -0.5; 0 and negative factors are honoured."""
    if scale is None:
        return float(head_dim**-0.5)
    scale = float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}. Pass a finite number, or None for D ** -0.5.")
    return scale


def checked_softcap(softcap: float | None) -> float | None:
    """None or a positive finite number."""
    if softcap is None:
        return None
    softcap = float(softcap)
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}. Pass a positive number, or None for no cap.")
    return softcap


def checked_probability(name: str, p: float) -> float:
    """A dropout probability in [0, 1]."""
    p = float(p)
    if not 0 <= p <= 1:
        raise ValueError(f"{name} is {p}, not a probability. Pass a number from 0 to 1.")
    return p


def usable(x: Array, xp: ModuleType) -> Array:
    """`x` itself, or a copy where kernels cannot index it: swapped bytes, or strides that are no whole elements."""
    if xp is not np or (x.flags.c_contiguous and x.flags.aligned and x.dtype.isnative):
        return x
    whole = all(stride % x.itemsize == 0 for stride, size in zip(x.strides, x.shape, strict=True) if size > 1)
    if whole and x.flags.aligned and x.dtype.isnative:
        return x
    return np.array(x, dtype=x.dtype.newbyteorder("="), order="C")
