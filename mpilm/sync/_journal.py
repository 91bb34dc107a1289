"""An update of memory that ranks share survives the death of the rank that makes it.

Each owner of a bucket updates a segment of it, piece by piece, and writes down how far it is: before a piece changes
it is copied, and afterwards it counts as done. So whoever finds an update half made can take back the piece that may be
torn and make the rest, to the bit:

    piece       0 done   1 done   2 may be torn: as it was before, then made anew   3 to be made

The copy of a piece stays in the cache of its core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from mpilm.comm.node import Node
from mpilm.flat import Flat

PIECE = 1 << 17     # elements; smaller ones cost more calls, larger ones fall out of the cache
STEP, COPIED, DONE, FIELDS = 0, 1, 2, 8     # of a record, in words: a cache line


class Journal:
    """What all owners write down. Collective over `owners`, but only to build it.

    Args:
        owners: Who share the memory.
        num_states: Arrays that an update changes besides masters and gradients. Weights follow from masters.

    Attributes:
        step: Number of the update in hand; every owner counts for itself.
    """

    def __init__(self, owners: Node, num_states: int) -> None:
        size, arrays = owners.comm.size, 2 + num_states
        self.records = owners.allocate_common(size * FIELDS, np.int64).reshape(size, FIELDS)
        self.before = torch.from_numpy(owners.allocate_common(size * arrays * PIECE, np.float32)).view(
            size, arrays, PIECE)
        self.step = 0

    def run(self, owner: int, flats: Iterable[Flat], apply: Callable[[Flat], None]) -> None:
        """Make the update in hand of an owner's segment, from wherever it has got to."""
        record, before = self.records[owner], self.before[owner]
        if record[STEP] != self.step:
            record[COPIED] = record[DONE] = 0
            record[STEP] = self.step
        for number, piece in enumerate(_pieces(flats)):
            if number < record[DONE]:
                continue
            pairs = list(zip(before, (piece.masters, *piece.gradients, *piece.states), strict=True))
            if number < record[COPIED]:
                for copy, array in pairs:
                    array.copy_(copy[:array.numel()])
            else:
                for copy, array in pairs:
                    copy[:array.numel()].copy_(array)
                record[COPIED] = number + 1
            apply(piece)
            record[DONE] = number + 1


def _pieces(flats: Iterable[Flat]) -> Iterator[Flat]:
    for flat in flats:
        for start in range(0, flat.masters.numel(), PIECE):
            yield flat.part(slice(start, start + PIECE))
