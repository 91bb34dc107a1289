"""Sums over the ranks of a node, in memory that all of them see: the additions of one rank on its own slice.

The order is a list of subtrees (leaves). A node's ranks are one leaf in the usual case, and several where a node's
ranks are not a whole subtree of the tree over all ranks. Chunks are small enough that partial sums stay in the core's
cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpilm.comm import arrays, order

CHUNK_BYTES = 256 * 2**10  # of each part at a time: sums stay in the second-level cache until they are copied on

RESULT = -1  # where the last addition of a leaf goes; scratch arrays are -2, -3, ...


class LocalSum:
    """Adds the same slice of every part of a node.

    Args:
        leaves: Ranges of node-local ranks, each summed for itself in the order of order.subtree.
        first: The number in the whole tree of the node's first rank.
        mine: My node-local rank.
    """

    def __init__(self, leaves: Sequence[range], *, first: int, mine: int) -> None:
        self.programs = [_program(leaf, first) for leaf in leaves]
        # one sum goes to my part; several to the part of each leaf's first rank, whose old content is then used up
        self.places = [mine] if len(leaves) == 1 else [leaf.start - first for leaf in leaves]
        spare = max((-slot - 1 for program in self.programs for *_, slot in program), default=0)
        self._scratch = [arrays.zeros(CHUNK_BYTES, np.uint8) for _ in range(spare)]

    def sum(self, parts: Sequence[np.ndarray], chunk: slice) -> None:
        """parts[places[i]][chunk] = the sum of leaf i. Only the rank that owns the chunk touches it meanwhile."""
        length, dtype = chunk.stop - chunk.start, parts[0].dtype
        values = [part[chunk] for part in parts]
        spare = [scratch[: length * dtype.itemsize].view(dtype) for scratch in self._scratch]
        for program, place in zip(self.programs, self.places, strict=True):
            for left, right, slot in program:
                out = values[place] if slot == RESULT else spare[-slot - 2]
                a = values[left] if left >= 0 else spare[-left - 2]
                b = values[right] if right >= 0 else spare[-right - 2]
                np.add(a, b, out=out)


def _program(leaf: range, first: int) -> list[tuple[int, int, int]]:
    """The additions of a leaf as (left, right, where to): parts are numbers from 0 up, scratch arrays from -2 down."""
    steps = order.subtree(leaf.start, leaf.stop)
    place = {rank: rank - first for rank in leaf}
    free = list(range(-2 - len(leaf), -1))
    program = []
    for number, (into, other) in enumerate(steps):
        operands = place[into], place[other]
        free += [slot for slot in reversed(operands) if slot < 0]
        place[into] = RESULT if number == len(steps) - 1 else free.pop()
        program.append((*operands, place[into]))
    return program
