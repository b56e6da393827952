"""One signature for a front end and for its twin that also gives the gradients."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

from numpy.typing import NDArray

Array = NDArray[Any]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Backward(Protocol):
    """What a twin ``f_vjp`` returns beside the result of ``f``."""

    def __call__(
        self, grad_output: Array, grad_weights: Array | None = None, mask_gradients: bool = False
    ) -> dict[str, Any]:
        """Gradients by the names of the front end's parameters; of float masks on request."""


def refuse_grad_weights(grad_weights: Array | None) -> None:
    """For functions that return no weights."""
    if grad_weights is not None:
        raise ValueError(f"grad_weights {grad_weights.shape}: this function returns no weights. Leave it out.")


def primal(
    vjp: Callable[Parameters, tuple[Result, Backward]],
) -> Callable[Parameters, Result]:
    """The front end ``f`` of a twin ``f_vjp``, whose docstring describes ``f`` and moves there."""

    @functools.wraps(vjp)
    def front_end(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return vjp(*args, **kwargs)[0]

    name = vjp.__name__.removesuffix("_vjp")
    front_end.__name__ = front_end.__qualname__ = name
    signature = inspect.signature(vjp)
    result = str(signature.return_annotation).removeprefix("tuple[").removesuffix(", Backward]")
    front_end.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]
    vjp.__doc__ = f"`{name}` and the function that gives its gradients; see `mha.compat`."
    return front_end
