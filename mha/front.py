"""What the front ends share: checks of a layer's inputs and gradients, and the axes between caller and layer."""

from __future__ import annotations

import threading
from typing import Any

from numpy.typing import NDArray

from mha.optional import array_module
from mha.problem import Dropout, checked_probability, shapes_of, usable
from mha.random import DropoutState, next_state

Array = NDArray[Any]


class LatestCall:
    """Each thread's own latest call in training, which its backward uses up. Copies and pickles hold none."""

    def __init__(self) -> None:
        self._local = threading.local()

    def keep(self, call: Any) -> None:
        """Remember a call, or with None that there is none."""
        self._local.call = call

    def get(self) -> Any:
        """The call.

        Raises
        ------
        RuntimeError
            If there is none.
        """
        call = getattr(self._local, "call", None)
        if call is None:
            raise RuntimeError("backward needs a call in training mode before it, one for each. Call the layer first.")
        return call

    def __reduce__(self) -> tuple[type[LatestCall], tuple[()]]:
        return LatestCall, ()


def check_inputs(query: Array, key: Array, value: Array, embed_dim: int, axes: str = "(N, length, width)") -> bool:
    """Shapes of query, key and value, batch first; returns whether they have a batch axis. `axes` is for messages."""
    if (
        query.ndim == key.ndim == value.ndim in (2, 3)
        and query.shape[-1] == embed_dim
        and key.shape[:-1] == value.shape[:-1]
        and key.shape[:-2] == query.shape[:-2]
    ):
        return query.ndim == 3
    shapes = shapes_of(query=query, key=key, value=value)
    if query.ndim not in (2, 3) or key.ndim != query.ndim or value.ndim != query.ndim:
        raise ValueError(f"{shapes}: all are {axes} or, unbatched, (length, width). Check the axes.")
    if query.shape[-1] != embed_dim:
        raise ValueError(f"{shapes}: the query's width is not embed_dim {embed_dim}. Make them equal.")
    raise ValueError(
        f"{shapes}: query, key and value need the same batch size, key and value the same length. Inputs are {axes}."
    )


def check_bias_rows(
    bias_k: Array | None, bias_v: Array | None, k_width: int, v_width: int
) -> tuple[Array, Array] | None:
    """Both (1, 1, width), or neither."""
    if bias_k is None and bias_v is None:
        return None
    expected = {"bias_k": (1, 1, k_width), "bias_v": (1, 1, v_width)}
    found = {name: None if x is None else x.shape for name, x in (("bias_k", bias_k), ("bias_v", bias_v))}
    if bias_k is None or bias_v is None or found != expected:
        listed = ", ".join(f"{name} {found[name]} where {expected[name]} is expected" for name in expected)
        raise ValueError(f"{listed}. Give both, of the projected widths, or neither.")
    return bias_k, bias_v


def dropouts(
    names: tuple[str, str], attention: float, output: float, training: bool
) -> tuple[Dropout | None, Dropout | None]:
    """The weights' dropout takes one state, the output's the next offset, whether or not both are in use."""
    drops = checked_probability(names[0], attention), checked_probability(names[1], output)
    if not training or not any(drops):
        return None, None
    state = next_state(2)
    states = state, DropoutState(state.seed, state.offset + 1)
    first, second = (Dropout(p, s) if p > 0 else None for p, s in zip(drops, states, strict=True))
    return first, second


def weights_gradient(
    name: str, grad: Array | None, shape: tuple[int, ...], full: tuple[int, ...], returned: bool
) -> Array | None:
    """An upstream gradient of returned weights of this shape, in the layer's shape `full`."""
    if grad is None:
        return None
    if not returned or grad.shape != shape:
        raise ValueError(
            f"{name} {grad.shape}: the call returned weights {shape if returned else None}. Pass the gradient of those."
        )
    return usable(grad.reshape(full), array_module(grad))


def gradient_like(name: str, grad: Array, shape: tuple[int, ...], like: Array) -> Array:
    """An upstream gradient, checked against the shape and dtype of the output that it belongs to."""
    xp = array_module(like, grad)
    if grad.shape != shape or (grad.dtype != like.dtype and grad.dtype.newbyteorder("=") != like.dtype):
        raise (TypeError if grad.shape == shape else ValueError)(
            f"{name} is {grad.dtype} {grad.shape}, the output {like.dtype} {shape}. Pass the gradient of that output."
        )
    return usable(grad, xp)
