"""Memory in which every rank of a node has a part that all of them see, and where in it a buffer lies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpilm.comm import arrays
from mpilm.comm.devices import Array

Found = tuple[list[Array], int]


class Allocations:
    """Of this node.

    Args:
        mine: My node-local rank.
        kind: The type of arrays.
    """

    def __init__(self, mine: int, kind: type) -> None:
        self.mine, self.kind = mine, kind
        self._all: list[list[Array]] = []
        self._found: dict[tuple[int, int, np.dtype], Found] = {}

    def add(self, parts: list[Array]) -> Array:
        """Remember an allocation, one equally long array a rank; returns mine."""
        self._all.append(parts)
        return parts[self.mine]

    def find(self, buffer: Array, allowed: Sequence[np.dtype] = arrays.DTYPES) -> Found:
        """The same stretch of every rank's part, and its place, if `buffer` lies in an allocation; else -1."""
        if arrays.code(buffer, allowed, self.kind) < 0 or not len(buffer):
            return [], -1
        key = (arrays.address(buffer), buffer.nbytes, buffer.dtype)
        if key not in self._found:
            found = self._search(buffer)
            if found[1] < 0:
                return found
            self._found[key] = found
        return self._found[key]

    def _search(self, buffer: Array) -> Found:
        place = 0
        for parts in self._all:
            mine = parts[self.mine]
            start = arrays.address(buffer) - arrays.address(mine)
            if start >= 0 and start + buffer.nbytes <= mine.nbytes:
                stretch = slice(start, start + buffer.nbytes)
                return [part.view(np.uint8)[stretch].view(buffer.dtype) for part in parts], place + start
            place += mine.nbytes
        return [], -1

    def clear(self) -> None:
        """Forget all of them."""
        self._all.clear()
        self._found.clear()
