"""What the modules of the front ends have in common: parameters by name, modes, the latest call, pickling."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from mha.dispatch import checked_library
from mha.front import LatestCall
from mha.optional import as_array, dtype_named, library_named, library_of_device

Array = NDArray[Any]


class ModuleGradients(NamedTuple):
    """Gradients of a module's call.

    query, key, value : arrays, or lists of arrays
        In the shapes of the inputs; None for what the module does not take. An array that was passed twice has the
        sum of two of them.
    parameters : dict of str to array
        By state-dict key.
    key_padding_mask, attn_mask : arrays or None
        Of float masks, on request.
    """

    query: Any
    key: Any
    value: Any
    parameters: dict[str, Array]
    key_padding_mask: Array | None = None
    attn_mask: Array | None = None


def check_heads(embed_dim: int, num_heads: int) -> None:
    """ValueError unless the width can be divided into the heads."""
    if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
        raise ValueError(
            f"embed_dim {embed_dim} must be divisible by num_heads {num_heads}, both greater than 0. "
            "Choose another number of heads."
        )


class FrontEndModule:
    """Base of the modules. Calls from several threads are safe; each has its own latest call for the backward."""

    training: bool
    _xp: ModuleType
    _dtype: np.dtype[Any]
    _latest: LatestCall

    def _start(self, device: Any, dtype: Any, training: bool = True) -> None:
        self._xp, self._dtype = checked_library(library_of_device(device)), dtype_named(dtype)
        self._latest = LatestCall()
        self.training = training

    def _array(self, x: Array) -> Array:
        made: Array = self._xp.asarray(x).astype(self._dtype)
        return made

    def _named(self) -> dict[str, Array | None]:
        """The parameters, absent ones as None, in the system's order."""
        raise NotImplementedError

    def _keep(self, call: Any) -> None:
        self._latest.keep(call if self.training else None)

    def train(self, mode: bool = True) -> Self:
        """Training mode: dropout applies, a backward may follow."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Evaluation mode."""
        return self.train(False)

    def state_dict(self, prefix: str = "") -> dict[str, Array]:
        """The parameters themselves, under the system's keys and in its order."""
        return {prefix + name: x for name, x in self._named().items() if x is not None}

    def named_parameters(self) -> list[tuple[str, Array]]:
        """Pairs of state-dict key and array."""
        return list(self.state_dict().items())

    def parameters(self) -> list[Array]:
        """The arrays, for an optimizer that changes them in place."""
        return list(self.state_dict().values())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy parameters in, from arrays or tensors.

        Raises
        ------
        ValueError
            If keys or shapes differ from those of `state_dict`.
        """
        own = self.state_dict()
        given = {name: as_array(x) for name, x in state_dict.items() if x is not None}
        shapes = {name: x.shape for name, x in given.items()}
        expected = {name: x.shape for name, x in own.items()}
        if shapes != expected:
            raise ValueError(f"state_dict has {shapes} where {expected} is expected. Build the layer alike.")
        for name, x in own.items():
            x[...] = self._xp.asarray(given[name])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_xp": self._xp.__name__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._xp = library_named(state["_xp"])
