"""``ivy.MultiHeadAttention`` on NumPy and CuPy arrays, with Ivy's own variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha import optional
from mha.compat.ivy.functional import multi_head_attention_vjp
from mha.compat.module_base import FrontEndModule, ModuleGradients
from mha.problem import checked_probability
from mha.random import next_generator, xavier_uniform

Array = NDArray[Any]

_BUILD_MODES = ("on_init", "explicit", "on_call")


class MultiHeadAttention(FrontEndModule):
    """``ivy.MultiHeadAttention``.

    Parameters
    ----------
    embed_dim : int, optional
        E, the width of query and output; None is num_heads * head_dim.
    key_dim, value_dim : int, optional
        Widths of key and value; None is E. Unless both are E the input weights are kept apart.
    num_heads, head_dim : int, optional
        H and D; a None follows from the other and E. H * D need not be E.
    dropout_rate : float
        Of the attention weights, in training.
    use_proj_bias : bool
        Whether the projections have biases.
    attention_axes : optional
        Has no effect, as in Ivy.
    scale : float, optional
        Factor on the scores; None is D ** -0.5.
    device : optional
        None or "cpu": NumPy arrays; "gpu:0", "cuda" ...: CuPy arrays.
    v : mapping of str to array, optional
        The variables, used as they are.
    build_mode : str
        When the variables are made: "on_init", "explicit" (by `build`), or "on_call".
    dtype : optional
        float16, bfloat16, float32 (None) or float64.
    training : bool

    Attributes
    ----------
    v : dict of str to array, or None before the build
        in_proj_weights (3*H*D, E), or q_proj_weights (H*D, E), k_proj_weights (H*D, key_dim) and v_proj_weights
        (H*D, value_dim); out_proj_weights (E, H*D); in_proj_bias (3*H*D,) and out_proj_bias (E,).

    Raises
    ------
    ValueError
        For sizes that contradict each other, and variables of other names or shapes.

    Notes
    -----
    After Ivy 1.0. Weights start Glorot-uniform, biases at 0, drawn from `mha.seed`.
    """

    def __init__(
        self,
        embed_dim: int | None = None,
        /,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        num_heads: int | None = 8,
        head_dim: int | None = None,
        dropout_rate: float = 0.0,
        use_proj_bias: bool = True,
        attention_axes: Any = None,
        scale: float | None = None,
        device: Any = None,
        v: Mapping[str, Any] | None = None,
        build_mode: str = "on_init",
        dtype: Any = None,
        training: bool = True,
    ) -> None:
        given = {"embed_dim": embed_dim, "num_heads": num_heads, "head_dim": head_dim}
        if sum(bool(x) for x in given.values()) < 2 or any(x is not None and x < 1 for x in given.values()):
            raise ValueError(f"{given}: two of these must be given, all positive. Give embed_dim and num_heads.")
        self.num_heads = num_heads or (embed_dim or 0) // (head_dim or 1)
        self.head_dim = head_dim or (embed_dim or 0) // self.num_heads
        self.embed_dim = embed_dim or self.num_heads * self.head_dim
        if (not head_dim and self.embed_dim % self.num_heads) or (not num_heads and self.embed_dim % self.head_dim):
            raise ValueError(f"{given}: embed_dim must be divisible by the number or the size of the heads.")
        self.key_dim, self.value_dim = key_dim or self.embed_dim, value_dim or self.embed_dim
        self.dropout_rate = checked_probability("dropout_rate", dropout_rate)
        self.use_proj_bias, self.attention_axes = bool(use_proj_bias), attention_axes
        self.scale = self.head_dim**-0.5 if scale is None else float(scale)
        if build_mode not in _BUILD_MODES:
            raise ValueError(f"build_mode is {build_mode!r}, none of {', '.join(_BUILD_MODES)}. Leave it out.")
        self.build_mode = build_mode
        self._start(device, dtype, bool(training))
        self.v: dict[str, Array] | None = None
        if v is not None:
            self.v = self._checked(v)
        elif build_mode == "on_init":
            self.build()

    def build(self) -> None:
        """Make the variables, drawn anew."""
        rng = next_generator()
        self.v = {
            name: self._array(xavier_uniform(rng, *shape) if len(shape) == 2 else np.zeros(shape))
            for name, shape in self._shapes().items()
        }

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        inner, width = self.num_heads * self.head_dim, self.embed_dim
        shapes: dict[str, tuple[int, ...]] = {"out_proj_weights": (width, inner)}
        if self.key_dim == self.value_dim == width:
            shapes["in_proj_weights"] = (3 * inner, width)
        else:
            for letter, columns in zip("qkv", (width, self.key_dim, self.value_dim), strict=True):
                shapes[f"{letter}_proj_weights"] = (inner, columns)
        if self.use_proj_bias:
            shapes |= {"in_proj_bias": (3 * inner,), "out_proj_bias": (width,)}
        return shapes

    def _checked(self, v: Mapping[str, Any]) -> dict[str, Array]:
        made = {name: optional.as_array(x) for name, x in v.items()}
        found = {name: x.shape for name, x in made.items()}
        if found != self._shapes():
            raise ValueError(f"v has {found} where {self._shapes()} is expected. Build the layer with its options.")
        return made

    def _named(self) -> dict[str, Array | None]:
        return dict(self.v or {})

    def __call__(
        self,
        query: Any,
        key: Any = None,
        value: Any = None,
        /,
        *,
        attention_mask: Any = None,
        is_causal: bool = False,
        return_attention_weights: bool = False,
        average_attention_weights: bool = True,
    ) -> Any:
        """Run the layer, batch first; see `mha.compat.ivy.multi_head_attention`.

        Returns
        -------
        output : (N, L, E) array
        weights : (N, L, S) array, per head (N, H, L, S), if asked for

        Raises
        ------
        RuntimeError
            If the variables are not built yet.
        TypeError, ValueError
            As `mha.compat.ivy.multi_head_attention`.
        """
        if self.v is None and self.build_mode == "on_call":
            self.build()
        if self.v is None:
            raise RuntimeError("the layer has no variables yet: build_mode is 'explicit'. Call build() first.")
        variables: dict[str, Any] = self.v
        result, backward = multi_head_attention_vjp(
            query, key=key, value=value, num_heads=self.num_heads, scale=self.scale, attention_mask=attention_mask,
            is_causal=is_causal, return_attention_weights=return_attention_weights,
            average_attention_weights=average_attention_weights, dropout=self.dropout_rate, training=self.training,
            **variables,
        )  # fmt: skip
        self._keep(backward)
        return result

    def backward(self, grad_output: Any, grad_weights: Any = None, *, mask_gradients: bool = False) -> ModuleGradients:
        """Gradients of this thread's latest call in training, which is used up.

        Raises
        ------
        RuntimeError
            Without a call in training since the last backward.
        TypeError, ValueError
            If the gradients do not fit what the call returned.
        """
        gradients = self._latest.get()(grad_output, grad_weights, mask_gradients)
        self._keep(None)
        return ModuleGradients(
            gradients["query"], gradients.get("key"), gradients.get("value"),
            {name: gradients[name] for name in self.state_dict()}, None, gradients.get("attention_mask"),
        )  # fmt: skip

    def __repr__(self) -> str:
        names = ("key_dim", "value_dim", "num_heads", "head_dim", "dropout_rate", "use_proj_bias", "attention_axes",
                 "scale", "build_mode")  # fmt: skip
        listed = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"MultiHeadAttention({self.embed_dim}, {listed}, dtype={self._dtype.name!r}, training={self.training})"
