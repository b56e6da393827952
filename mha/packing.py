"""The layout of ``io_weight_bias``: order, shapes and offsets of the pieces of one flat parameter vector.

Everything else asks `PackedLayout`; no other module computes an offset.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mha.optional import array_module, bfloat16, is_array

_FLOATING = (
    np.dtype(np.float16),
    np.dtype(np.float32),
    np.dtype(np.float64),
    *([] if bfloat16 is None else [bfloat16]),
)


class PackedEntry(NamedTuple):
    """One piece of the vector: ``shape`` elements in row-major order, beginning at element ``offset``."""

    name: str
    offset: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Offset of the first element after this piece."""
        return self.offset + math.prod(self.shape)


@dataclass(frozen=True, init=False)
class PackedLayout:
    """Which projections and biases an attention layer has, and where each lies in its flat vector.

    The vector holds Wq, Wk, Wv, Wo and then bq, bk, bv, bo, each only if present. A weight has shape
    (in-features, out-features) and is used as ``x @ W + b``; head h owns columns ``h * d`` to ``(h + 1) * d - 1`` of
    Wq, Wk, Wv and those rows of Wo. An absent projection hands the whole input to every head.

    Parameters
    ----------
    embed_dim : int
        Width E of the query.
    num_heads : int
        Query heads H.
    kdim, vdim : int, optional
        Widths of key and value; None means `embed_dim`.
    qproj_size, kproj_size, vproj_size, oproj_size : int, optional
        Output widths of the projections; 0 means absent. None means `embed_dim`, but for key and value with fewer
        heads than the query ``embed_dim // num_heads * num_kv_heads``.
    qbias, kbias, vbias, obias : bool
        Whether that projection adds a bias.
    num_kv_heads : int, optional
        Key and value heads Hk, a divisor of `num_heads`; None means `num_heads`.

    Raises
    ------
    ValueError
        If sizes contradict each other, a size is not divisible by its heads, or a bias has no projection.
    TypeError
        If a size is not an integer or a bias flag is not a bool.

    Notes
    -----
    The parameters are also attributes, with every None resolved. Layouts are immutable, hashable and picklable, and
    ``eval(repr(layout)) == layout``. Grouped heads aside, layout, defaults and scale are those of MegEngine 1.13.

    Examples
    --------
    >>> layout = PackedLayout(8, 2, kdim=6, qbias=True, oproj_size=0)
    >>> [entry.name for entry in layout.entries], layout.length
    (['q_weight', 'k_weight', 'v_weight', 'q_bias'], 184)
    """

    embed_dim: int
    num_heads: int
    kdim: int
    vdim: int
    qproj_size: int
    kproj_size: int
    vproj_size: int
    oproj_size: int
    qbias: bool
    kbias: bool
    vbias: bool
    obias: bool
    num_kv_heads: int

    def __init__(
        self,
        embed_dim: SupportsIndex,
        num_heads: SupportsIndex,
        *,
        kdim: SupportsIndex | None = None,
        vdim: SupportsIndex | None = None,
        qproj_size: SupportsIndex | None = None,
        kproj_size: SupportsIndex | None = None,
        vproj_size: SupportsIndex | None = None,
        oproj_size: SupportsIndex | None = None,
        qbias: bool = False,
        kbias: bool = False,
        vbias: bool = False,
        obias: bool = False,
        num_kv_heads: SupportsIndex | None = None,
    ) -> None:
        width = _integer("embed_dim", embed_dim, minimum=1)
        heads = _integer("num_heads", num_heads, minimum=1)
        kv_heads = heads if num_kv_heads is None else _integer("num_kv_heads", num_kv_heads, minimum=1)
        kv_width = width if kv_heads == heads else width // heads * kv_heads
        if kv_width == 0 and None in (kproj_size, vproj_size):
            raise ValueError(
                f"embed_dim {width} is smaller than num_heads {heads}, so kproj_size and vproj_size have no default. "
                "Give both, or use at most embed_dim heads."
            )
        sizes = {
            "kdim": (kdim, width),
            "vdim": (vdim, width),
            "qproj_size": (qproj_size, width),
            "kproj_size": (kproj_size, kv_width),
            "vproj_size": (vproj_size, kv_width),
            "oproj_size": (oproj_size, width),
        }
        flags = {"qbias": qbias, "kbias": kbias, "vbias": vbias, "obias": obias}
        resolved: dict[str, int] = {"embed_dim": width, "num_heads": heads, "num_kv_heads": kv_heads}
        resolved |= {name: default if size is None else _integer(name, size) for name, (size, default) in sizes.items()}
        resolved |= {name: _flag(name, flag) for name, flag in flags.items()}
        for name, value in resolved.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_heads {heads} is not divisible by num_kv_heads {kv_heads}. "
                "Every key head serves the same number of query heads: choose a divisor."
            )
        for letter, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            size = self._projections[letter]
            if size % count:
                raise ValueError(
                    f"{letter}proj_size {size} is not divisible by its {count} heads (embed_dim {self.embed_dim}, "
                    f"num_heads {heads}, num_kv_heads {kv_heads}). Choose a multiple of {count}, or 0 for none."
                )
        for letter, size in self._projections.items():
            if size == 0 and getattr(self, f"{letter}bias"):
                raise ValueError(
                    f"{letter}bias is set but {letter}proj_size is 0. A bias belongs to a projection: clear the flag, "
                    "or give the projection a size."
                )
        if self.qproj_size and self.embed_dim < heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is smaller than num_heads {heads}, so the scale (embed_dim // num_heads) "
                "** -0.5 is infinite. Use at most embed_dim heads."
            )
        k_head_dim = self.kproj_size // kv_heads or self.kdim
        if self.q_head_dim != k_head_dim:
            raise ValueError(
                f"query heads are {self.q_head_dim} wide (embed_dim {self.embed_dim}, qproj_size {self.qproj_size}, "
                f"{heads} heads) but key heads {k_head_dim} (kdim {self.kdim}, kproj_size {self.kproj_size}, "
                f"{kv_heads} heads). Make them equal; an absent projection gives every head the whole input width."
            )

    @property
    def _projections(self) -> dict[str, int]:
        return {"q": self.qproj_size, "k": self.kproj_size, "v": self.vproj_size, "o": self.oproj_size}

    @property
    def q_head_dim(self) -> int:
        """Width D of one query head, which is also that of one key head."""
        return self.qproj_size // self.num_heads or self.embed_dim

    @property
    def v_head_dim(self) -> int:
        """Width Dv of one value head."""
        return self.vproj_size // self.num_kv_heads or self.vdim

    @property
    def scale(self) -> float:
        """Factor on the scores; as in MegEngine it ignores `qproj_size` unless that is 0."""
        width = self.embed_dim // self.num_heads if self.qproj_size else self.embed_dim
        return float(width**-0.5)

    @property
    def output_size(self) -> int:
        """Width of the output: of the output projection, or of all heads side by side."""
        return self.oproj_size or self.num_heads * self.v_head_dim

    @cached_property
    def entries(self) -> tuple[PackedEntry, ...]:
        """The pieces present, in buffer order: ``q_weight`` ... ``o_weight``, then ``q_bias`` ... ``o_bias``."""
        rows = {"q": self.embed_dim, "k": self.kdim, "v": self.vdim, "o": self.num_heads * self.v_head_dim}
        sizes = self._projections
        shapes: dict[str, tuple[int, ...]] = {f"{x}_weight": (rows[x], size) for x, size in sizes.items() if size}
        shapes |= {f"{x}_bias": (size,) for x, size in sizes.items() if getattr(self, f"{x}bias")}
        entries: list[PackedEntry] = []
        for name, shape in shapes.items():
            entries.append(PackedEntry(name, entries[-1].stop if entries else 0, shape))
        return tuple(entries)

    @property
    def length(self) -> int:
        """Elements of the vector."""
        return self.entries[-1].stop if self.entries else 0

    def views(self, buffer: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Name the pieces of a vector without copying: writing to a view writes to `buffer`.

        Parameters
        ----------
        buffer : array
            C-contiguous, `length` elements in any shape (MegEngine's module uses ``(1, length)``).

        Returns
        -------
        dict of str to array
            A view for each of `entries`, in their order.

        Raises
        ------
        ValueError
            If the number of elements is wrong or the array is not C-contiguous.
        TypeError
            If `buffer` is not an array.
        """
        if not is_array(buffer):
            raise TypeError(f"io_weight_bias is a {type(buffer).__name__}, not an array. Pass a NumPy or CuPy array.")
        if buffer.size != self.length:
            raise ValueError(
                f"io_weight_bias has shape {buffer.shape}, {buffer.size} elements, but this layout has {self.length}: "
                f"{self._describe()}. Check the sizes and bias flags."
            )
        if not buffer.flags.c_contiguous:
            raise ValueError(
                f"io_weight_bias of shape {buffer.shape} and strides {buffer.strides} is not C-contiguous, so its "
                "pieces are not views. Copy it first, with numpy.ascontiguousarray."
            )
        flat = buffer.reshape(-1)
        return {entry.name: flat[entry.offset : entry.stop].reshape(entry.shape) for entry in self.entries}

    def pack(
        self, parts: Mapping[str, NDArray[Any]], dtype: DTypeLike | None = None, xp: ModuleType = np
    ) -> NDArray[Any]:
        """Copy named pieces into one new vector; the inverse of `views`.

        Parameters
        ----------
        parts : mapping of str to array
            Exactly the names and shapes of `entries`, of a floating dtype and any strides.
        dtype : dtype, optional
            Of the vector. None means the one dtype that all parts share, float32 if there are none.
        xp : module
            The array library of the parts and the vector.

        Returns
        -------
        array, shape (length,)

        Raises
        ------
        ValueError
            If parts are missing, unknown or of the wrong shape.
        TypeError
            If a part is not a floating array of `xp`, or if dtypes differ and `dtype` is None.
        """
        self._check_parts(parts, xp)
        dtypes = {name: part.dtype for name, part in parts.items()}
        if dtype is None and len(set(dtypes.values())) > 1:
            listed = ", ".join(f"{name} {found}" for name, found in dtypes.items())
            raise TypeError(f"the parts differ in dtype: {listed}. Convert them, or pass dtype.")
        result = np.dtype(next(iter(dtypes.values()), np.float32) if dtype is None else dtype)
        for name, found in (dtypes | {"the vector": result}).items():
            if found not in _FLOATING:
                known = ", ".join(map(str, _FLOATING))
                raise TypeError(f"{name} has dtype {found}, which is not one of {known}. Convert it to one of those.")
        buffer: NDArray[Any] = xp.empty(self.length, dtype=result)
        for name, view in self.views(buffer).items():
            view[...] = parts[name]
        return buffer

    def _check_parts(self, parts: Mapping[str, NDArray[Any]], xp: ModuleType) -> None:
        expected = {entry.name: entry.shape for entry in self.entries}
        missing = [name for name in expected if name not in parts]
        unknown = [name for name in parts if name not in expected]
        if missing or unknown:
            raise ValueError(
                f"parts missing: {missing}; parts this layout does not have: {unknown}; it has {self._describe()}. "
                "Give exactly those, or change the layout's sizes and bias flags."
            )
        for name, part in parts.items():
            if not is_array(part):
                raise TypeError(f"part {name} is a {type(part).__name__}, not an array. Convert it first.")
        if parts and array_module(*parts.values()) is not xp:
            found = array_module(*parts.values()).__name__
            raise TypeError(f"the parts are {found} arrays but xp is {xp.__name__}. Pass xp={found}.")
        shapes = {name: (parts[name].shape, shape) for name, shape in expected.items()}
        wrong = [f"{name} {found}, not {shape}" for name, (found, shape) in shapes.items() if found != shape]
        if wrong:
            raise ValueError(f"wrong shapes: {'; '.join(wrong)}. A weight is (in-features, out-features).")

    def _describe(self) -> str:
        return ", ".join(f"{entry.name} {entry.shape}" for entry in self.entries) or "no pieces"


def _integer(name: str, value: SupportsIndex, minimum: int = 0) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, not an integer. Pass an int.")
    if number < minimum:
        raise ValueError(f"{name} is {number}, but must be at least {minimum}. Pass a larger number.")
    return number


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is a {type(value).__name__}, not a bool. It only says whether the bias is present.")
    return bool(value)
