"""Runs of a matrix, or of some of its columns, taken apart into rectangles: so that any can be cut out of any others.

A run begins and ends in the middle of a row, so it is at most three rectangles:

    columns 2 ... 5 of a matrix, elements 2 ... 9 of them:        . . a a
                                                                  b b b b         a, b and c, and where in the run each
                                                                  c c . .         begins

What two rectangles have in common is a rectangle again, and is copied in one go, however many rows it has. Pure
arithmetic on NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mpilm.checkpoint.pieces import Columns


@dataclass(frozen=True)
class Rectangle:
    """Rows top ... bottom - 1 and columns left ... right - 1 of a matrix, where they lie in a run.

    Args:
        offset: Of its first element in the run.
        width: Elements of the run from one row to the next.
    """

    top: int
    bottom: int
    left: int
    right: int
    offset: int
    width: int

    def within(self, other: Rectangle) -> Rectangle | None:
        """What both have in common, where it lies in the run of `self`; None: nothing."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        if top >= bottom or left >= right:
            return None
        offset = self.offset + (top - self.top) * self.width + left - self.left
        return Rectangle(top, bottom, left, right, offset, self.width)

    @property
    def span(self) -> int:
        """Elements of the run from its first to its last one."""
        return (self.bottom - self.top - 1) * self.width + self.right - self.left

    def view(self, span: np.ndarray) -> np.ndarray:
        """It as a matrix, of those elements of the run."""
        assert span.size == self.span
        assert span.flags.c_contiguous
        return as_strided(span, (self.bottom - self.top, self.right - self.left),
                          (self.width * span.itemsize, span.itemsize))


def rectangles(shape: Sequence[int], columns: Columns | None, start: int, count: int) -> list[Rectangle]:
    """The run [start, start + count) of those columns of a matrix, flattened; None: of all."""
    left, right = columns or (0, shape[1])
    width, stop = right - left, start + count
    ends = [start, min(stop, -(-start // width) * width), max(start, stop // width * width), stop]
    if ends[1] > ends[2]:       # all in one row
        ends = [start, stop]
    return [_rectangle(low, high, left, width, low - start)
            for low, high in pairwise(ends) if low < high]


def _rectangle(low: int, high: int, left: int, width: int, offset: int) -> Rectangle:
    """Elements low ... high - 1: of one row, or of whole ones."""
    top, first = divmod(low, width)
    rows = max(1, (high - low) // width)
    return Rectangle(top, top + rows, left + first, left + first + (high - low) // rows, offset, width)
