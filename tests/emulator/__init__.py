"""A GPU on a CPU: the product's CUDA kernels, compiled by a C++ compiler and run on arrays of their own kind.

`install` makes the package take `Array` for arrays of a GPU library, with everything between the public functions and
the kernels being the product's.
"""

from __future__ import annotations

from functools import cache

from emulator.arrays import Array, asarray, asnumpy, library
from emulator.runtime import Emulated, compiler


@cache
def install() -> Emulated:
    """Register the library and the runtime that runs its kernels; returns the latter."""
    from mha import dispatch
    from mha.gpu import runtime

    emulated = Emulated()
    runtime.register(library, emulated)
    dispatch.register(library, Array, "mha.gpu")
    return emulated


__all__ = ["Array", "asarray", "asnumpy", "compiler", "install", "library"]
