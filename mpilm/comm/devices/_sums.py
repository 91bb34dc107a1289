"""Sums over the ranks of a node, in memory that all of them see: the additions of one rank on its own slice.

The order is a list of subtrees (leaves). A node's ranks are one leaf in the usual case, and several where a node's
ranks are not a whole subtree of the tree over all ranks. Chunks are small enough that partial sums stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mpilm.comm import arrays, order

CHUNK_BYTES = 256 * 2**10  # of each part at a time: sums stay in the second-level cache until they are copied on


class NodeSum(Protocol):
    """Adds the same slice of every part of a node.

    Attributes:
        places: The part that each leaf's sum goes to. One sum goes to mine; several to that of each leaf's first
            rank, whose old content is used up by then.
        chunk_bytes: Of each part, that `sum` takes at a time at most.
    """

    places: list[int]
    chunk_bytes: int

    def sum(self, parts: Sequence[Any], chunk: slice, *, spread: bool = False) -> None:
        """parts[places[i]][chunk] = the sum of leaf i. Only the rank that owns the chunk touches it meanwhile.

        Args:
            spread: Put the sum, of one leaf, into all parts.
        """


class LocalSum:
    """NodeSum, one addition after the other.

    Args:
        leaves: Runs of ranks, each summed for itself in the order of order.subtree.
        first: The node's first rank, which has part 0.
        size: Ranks of the node.
        mine: My node-local rank.
        zeros: Makes scratch arrays of (count, dtype).
        grain: Chunks are so many times CHUNK_BYTES.
    """

    def __init__(self, leaves: Sequence[range], *, first: int, size: int, mine: int,
                 zeros: Callable[[int, npt.DTypeLike], Any] = arrays.zeros, grain: int = 1) -> None:
        self.places, self.chunk_bytes = places(leaves, first=first, mine=mine), grain * CHUNK_BYTES
        self.steps: list[tuple[int, int, int]] = []
        for leaf, place in zip(leaves, self.places, strict=True):
            self.steps += _steps(leaf, first=first, scratch=size, result=place)
        used = 1 + max((place for step in self.steps for place in step), default=0)
        self._scratch = [zeros(self.chunk_bytes, np.uint8) for _ in range(max(0, used - size))]

    def sum(self, parts: Sequence[Any], chunk: slice, *, spread: bool = False) -> None:
        """As NodeSum."""
        values = [part[chunk] for part in parts]
        values += self._spare(chunk.stop - chunk.start, parts[0].dtype)
        for left, right, out in self.steps:
            np.add(values[left], values[right], out=values[out])
        total = self.places[0]
        for place in range(len(parts)) if spread else ():
            if place != total:
                values[place][:] = values[total]

    def _spare(self, length: int, dtype: npt.DTypeLike) -> list[Any]:
        return [scratch.view(dtype)[:length] for scratch in self._scratch]


def places(leaves: Sequence[range], *, first: int, mine: int) -> list[int]:
    """The part that each leaf's sum goes to, see NodeSum."""
    return [mine] if len(leaves) == 1 else [leaf.start - first for leaf in leaves]


def _steps(leaf: range, *, first: int, scratch: int, result: int) -> list[tuple[int, int, int]]:
    """The additions of a leaf, (left, right, out): parts are numbered from 0, scratch arrays from `scratch` on."""
    place = {rank: rank - first for rank in leaf}
    free = list(range(scratch + len(leaf), scratch - 1, -1))
    steps = []
    additions = order.subtree(leaf.start, leaf.stop)
    for number, (into, other) in enumerate(additions):
        left, right = place[into], place[other]
        free += [slot for slot in (right, left) if slot >= scratch]
        place[into] = free.pop() if number < len(additions) - 1 else result
        steps.append((left, right, place[into]))
    return steps
