"""Type of the arrays -> backend. A backend answers with the reasons why it cannot run a problem.

The environment variable ``MHA_BACKEND`` forces one, for tests.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType
from typing import Any

from mha.optional import array_module, register_library
from mha.problem import AttentionProblem, Dropout

#: Library of the arrays -> the module that computes on them.
_BACKENDS = {"numpy": "mha.cpu", "cupy": "mha.gpu"}
_BY_NAME = {"cpu": "mha.cpu", "gpu": "mha.gpu", "reference": "mha.reference_backend"}


def register(library: ModuleType, array_type: type, backend: str) -> None:
    """Have arrays of another library computed by the module named `backend`.

    Parameters
    ----------
    library : module
        Has the functions of NumPy's that the package uses, and `ndarray`.
    array_type : type
        Of its arrays.
    backend : str
        Import name of a module with the functions of `mha.cpu`.
    """
    register_library(library, array_type)
    _BACKENDS[library.__name__] = backend


def backend_of(*arrays: Any) -> Any:
    """The backend for these arrays.

    Raises
    ------
    TypeError
        If they belong to different libraries, or to one that nothing here computes on.
    RuntimeError
        If ``MHA_BACKEND`` names no backend, or one that does not compute on them.
    """
    return _backend(array_module(*arrays).__name__)


def checked_library(library: ModuleType) -> ModuleType:
    """The library itself, if arrays of it can be made and computed on here.

    Raises
    ------
    TypeError
        If nothing here computes on its arrays.
    RuntimeError
        If it finds no device, or none that the kernels run on; or if ``MHA_BACKEND`` names no backend, or one
        that does not compute on them.
    """
    _backend(library.__name__).check(library)
    return library


def _backend(library: str) -> Any:
    forced = os.environ.get("MHA_BACKEND")
    own = _BACKENDS.get(library)
    if not forced:
        if own is None:
            raise TypeError(f"there is no backend for {library} arrays. Convert them to {' or '.join(_BACKENDS)}.")
        return _module(own)
    if forced not in _BY_NAME:
        raise RuntimeError(f"MHA_BACKEND={forced!r} is none of {', '.join(_BY_NAME)}. Choose one, or unset it.")
    # Kernels that took the addresses of another library's arrays would read memory that is not theirs.
    if forced != "reference" and _BY_NAME[forced] != own:
        raise RuntimeError(f"MHA_BACKEND={forced!r} does not compute on {library} arrays. Unset it.")
    return _module(_BY_NAME[forced])


def backend_for(problem: AttentionProblem) -> Any:
    """The backend for a problem; one with an explicit dropout mask runs on the reference.

    Raises
    ------
    RuntimeError
        With every reason, if a forced backend cannot run it.
    """
    if problem.dropout is not None and problem.dropout.keep is not None:
        return _module(_BY_NAME["reference"])
    backend = backend_of(problem.query)
    reasons = backend.unsupported_reasons(problem)
    if reasons:
        hint = "Unset MHA_BACKEND" if os.environ.get("MHA_BACKEND") else "Move the arrays to NumPy"
        raise RuntimeError(f"the {backend.NAME} backend cannot run this: {'; '.join(reasons)}. {hint}.")
    return backend


def dropout_backend(x: Any, dropout: Dropout | None) -> Any:
    """The backend for the dropout of an output; one with an explicit mask runs on the reference."""
    explicit = dropout is not None and dropout.keep is not None
    return _module(_BY_NAME["reference"]) if explicit else backend_of(x)


def _module(name: str) -> ModuleType:
    return import_module(name)
