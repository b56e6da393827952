"""How products of float32 are computed where the hardware offers a choice."""

from __future__ import annotations

#: Name -> whether matrix instructions are used on a GPU.
_CHOICES = {"exact": False, "tf32x3": True}
_chosen = "exact"


def set_float32_precision(precision: str) -> None:
    """Choose how a GPU multiplies float32 matrices inside attention, for all calls from now on.

    Parameters
    ----------
    precision : {"exact", "tf32x3"}
        "exact", the default, multiplies and adds in float32. "tf32x3" splits each operand in two parts of 11 bits and
        takes three products of them by matrix instructions: faster, relative errors of about 2**-21 instead of 2**-24.
        It needs compute capability 8.0; older devices and the CPU stay exact.

    Raises
    ------
    ValueError
        For another name.
    """
    global _chosen
    if precision not in _CHOICES:
        raise ValueError(f"float32 precision is {precision!r}. Choose {' or '.join(map(repr, _CHOICES))}.")
    _chosen = precision


def get_float32_precision() -> str:
    """What `set_float32_precision` has chosen."""
    return _chosen


def float32_by_tensor() -> bool:
    """Whether float32 goes to matrix instructions."""
    return _CHOICES[_chosen]
