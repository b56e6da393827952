"""A matrix whose rows or columns may be two axes in memory: positions of samples, columns of heads."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numpy.typing import NDArray

Array = NDArray[Any]


class Matrix(NamedTuple):
    """An array seen as a matrix.

    `row_axes` and `column_axes` name one or two axes each, outer before inner, and together every axis that is not of
    size 1. Nothing is copied: projected heads (N, H, L, D) are the matrix (N*L, H*D) with axes (0, 2) and (1, 3).
    """

    array: Array
    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        sizes = self.array.shape
        return math.prod([sizes[i] for i in self.row_axes]), math.prod([sizes[i] for i in self.column_axes])

    @property
    def T(self) -> Matrix:
        """The transpose."""
        return Matrix(self.array, self.column_axes, self.row_axes)

    def dense(self) -> Array:
        """As a two-dimensional array: a view if the axes permit, else a copy."""
        return self.array.transpose(*self.row_axes, *self.column_axes).reshape(self.shape)

    def assign(self, value: Array) -> None:
        """Write a two-dimensional array into the matrix."""
        axes = (*self.row_axes, *self.column_axes)
        self.array.transpose(*axes)[...] = value.reshape([self.array.shape[axis] for axis in axes])


def rows_of(x: Array) -> Matrix:
    """(N, T, F) or (T, F) as (N*T, F)."""
    return Matrix(x, tuple(range(x.ndim - 1)), (x.ndim - 1,))


def heads_of(x: Array) -> Matrix:
    """(N, H, T, D) as (N*T, H*D)."""
    return Matrix(x, (0, 2), (1, 3))
