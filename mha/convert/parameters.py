"""One attention layer between formats: its projections, whatever tensors they came from, and the packed vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from mha.optional import array_module
from mha.packing import PackedLayout

Array = NDArray[Any]

LETTERS = "qkvo"
WORDS = {"q": "query", "k": "key", "v": "value", "o": "output"}


class PackedParameters(NamedTuple):
    """The parameters of one attention layer in this package's own format.

    Attributes
    ----------
    io_weight_bias : array, shape (layout.length,)
        All projections and biases, in the order that `layout` describes.
    layout : PackedLayout
    bias_k, bias_v : array, shape (1, 1, kproj_size) and (1, 1, vproj_size), optional
        One extra, already projected key and value; both or neither.
    scale : float, optional
        Factor on the scores; None is ``layout.scale``.
    """

    io_weight_bias: Array
    layout: PackedLayout
    bias_k: Array | None = None
    bias_v: Array | None = None
    scale: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What `multi_head_attention` is to be called with, beside the inputs and dropout."""
        layout = self.layout
        names = ("embed_dim", "num_heads", *(f"{x}proj_size" for x in LETTERS), *(f"{x}bias" for x in LETTERS),
                 "num_kv_heads")  # fmt: skip
        arrays = {"io_weight_bias": self.io_weight_bias, "bias_k": self.bias_k, "bias_v": self.bias_v}
        return {name: getattr(layout, name) for name in names} | arrays | {"scale": self.scale}


class Projection(NamedTuple):
    """``x @ weight + bias``: weight (in-features, out-features), bias (out-features,); `name` is its tensor's."""

    weight: Array
    bias: Array | None
    name: str


@dataclass(frozen=True)
class Layer:
    """What every format says in its own way. Arrays may be views of any strides."""

    projections: dict[str, Projection]
    num_heads: int
    num_kv_heads: int
    scale: float | None = None
    bias_k: Array | None = None
    bias_v: Array | None = None

    @property
    def head_dims(self) -> dict[str, int]:
        """Width of a head of query, key and value."""
        heads = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
        return {letter: self.projections[letter].weight.shape[1] // count for letter, count in heads.items()}

    @property
    def own_scale(self) -> float:
        """The factor on the scores, explicit or the usual one."""
        return self.head_dims["q"] ** -0.5 if self.scale is None else self.scale

    def packed(self) -> PackedParameters:
        """Copied into one vector.

        Raises
        ------
        ValueError
            If shapes contradict each other or the heads.
        TypeError
            If the arrays are not floating or differ in dtype or library.
        """
        options: dict[str, Any] = {"oproj_size": 0}
        parts = {}
        for letter, (weight, bias, _) in self.projections.items():
            options[f"{letter}proj_size"] = weight.shape[1]
            options[f"{letter}bias"] = bias is not None
            parts[f"{letter}_weight"] = weight
            if bias is not None:
                parts[f"{letter}_bias"] = bias
        layout = PackedLayout(
            self.projections["q"].weight.shape[0], self.num_heads, kdim=self.projections["k"].weight.shape[0],
            vdim=self.projections["v"].weight.shape[0], num_kv_heads=self.num_kv_heads, **options,
        )  # fmt: skip
        self._check_output(layout)
        vector = layout.pack(parts, xp=array_module(*parts.values()))
        check_appended(self.bias_k, self.bias_v, layout, vector)
        bias_k, bias_v = (None if bias is None else bias.copy(order="C") for bias in (self.bias_k, self.bias_v))
        scale = None if self.own_scale == layout.scale else self.own_scale
        return PackedParameters(vector, layout, bias_k, bias_v, scale)

    def _check_output(self, layout: PackedLayout) -> None:
        features = layout.num_heads * layout.v_head_dim
        if "o" in self.projections and self.projections["o"].weight.shape[0] != features:
            name, weight = self.projections["o"].name, self.projections["o"].weight
            raise ValueError(
                f"{name} takes {weight.shape[0]} in-features (weight {weight.shape} as in, out), but "
                f"{layout.num_heads} heads of {layout.v_head_dim} values give it {features}. Check num_heads and "
                "num_kv_heads."
            )

    @classmethod
    def unpacked(cls, parameters: PackedParameters) -> Layer:
        """Views of packed parameters.

        Raises
        ------
        ValueError, TypeError
            If the arrays do not fit the layout.
        """
        vector, layout, bias_k, bias_v, scale = parameters
        views = layout.views(vector)
        check_appended(bias_k, bias_v, layout, vector)
        found = {
            letter: Projection(views[f"{letter}_weight"], views.get(f"{letter}_bias"), f"{letter}_weight")
            for letter in LETTERS
            if f"{letter}_weight" in views
        }
        scale = layout.scale if scale is None else scale
        usual = layout.q_head_dim**-0.5
        return cls(found, layout.num_heads, layout.num_kv_heads, None if scale == usual else scale, bias_k, bias_v)


def check_appended(bias_k: Array | None, bias_v: Array | None, layout: PackedLayout, vector: Array) -> None:
    """Whether bias_k and bias_v are both there or both not, and fit."""
    if bias_k is None and bias_v is None:
        return
    if bias_k is None or bias_v is None:
        raise ValueError(
            f"bias_{'v' if bias_k is None else 'k'} is given alone. Give both bias_k and bias_v, or neither."
        )
    for name, bias, width in (("bias_k", bias_k, layout.kproj_size), ("bias_v", bias_v, layout.vproj_size)):
        if bias.shape != (1, 1, width):
            raise ValueError(f"{name} has shape {bias.shape}, not (1, 1, {width}). It is one projected row, all heads.")
        if bias.dtype != vector.dtype:
            raise TypeError(f"{name} is {bias.dtype} but io_weight_bias is {vector.dtype}. Convert one of them.")
