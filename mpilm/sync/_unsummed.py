"""Gradients that nobody sums before they are used: the update of a segment reads what every rank has there.

    rank 0, slot 0   [ segment 0 | segment 1 ]     bf16, as the backward pass made them
            slot 1   [ segment 0 | segment 1 ]
    rank 1, slot 2   [ segment 0 | segment 1 ]
            slot 3   [ segment 0 | segment 1 ]
    rank r's update  masters, states and weights of segment r <- all slots' gradients of segment r

Where ranks see each other's memory, a sum that is written down is written to be read once. Without it a step of two
ranks moves a quarter fewer bytes, and memory is what additions and updates wait for. Sums are float32, along the tree
over all slots, and made twice: for the norm, and for the update. So their bits are those of written sums; the norm's
are where that is asked for, which takes a place to write them down for a moment.

That takes an update that is compiled, so that a sum stays in registers; as many slots on every rank, and no more memory
for them than for their sum; no compression; ranks that are all on one node; not too many addends, because a core reads
so many streams at once; and nobody who outlives others and finishes their updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpilm import bridge
from mpilm.comm import arrays
from mpilm.comm.collectives import Then
from mpilm.comm.devices import ROW, Device
from mpilm.comm.order import BLOCK
from mpilm.comm.worker import Call
from mpilm.flat import add
from mpilm.sync._gradients import put
from mpilm.sync._layout import Layout, Member

CHUNK = 64 * BLOCK  # sums that are written down for the norm: a call costs little beside them


class Unsummed:
    """Gradients in the dtype of the weights, which is not float32.

    Args:
        mine: Those that I collect, slot by slot.
        addends: Everyone's, as far as my segment goes, rank by rank.
        exact: Sums of squares have the bits of a sum that is in memory.
    """

    def __init__(self, mine: Sequence[Tensor], addends: Sequence[Tensor], *, exact: bool) -> None:
        self.mine, self.addends, self.nbytes = mine, tuple(addends), sum(slot.nbytes for slot in mine)
        self.exact = exact

    @classmethod
    def build(cls, layout: Layout, collective: Any, own: slice, *, dtype: torch.dtype, num_slots: int,
              exact: bool) -> Unsummed | None:
        """Over the owners of a collective, each of so many slots; None where they do not see each other's memory.
        Collective over it."""
        mine = collective.allocate(num_slots * layout.count, bridge.array_dtype(dtype))
        everyone = [collective.seen(mine, owner) for owner in range(collective.owners.size)]
        if any(one is None for one in everyone):
            return None
        slots = [bridge.tensor(one, dtype).view(num_slots, -1) for one in everyone]
        return cls(list(bridge.tensor(mine, dtype).view(num_slots, -1)), [slot[own] for one in slots for slot in one],
                   exact=exact)

    def visit(self, member: Member, slot: int, gradient: Tensor | None) -> None:
        """As Gradients."""
        put(gradient, self.mine[slot][member.start:member.start + member.count])

    def depart(self, slot: int) -> Callable[[Then], None]:
        """As Gradients: they stay where they are."""
        return nothing_to_send

    def departed(self, slot: int, future: Call) -> None:
        """As Gradients."""

    def squares(self, device: Device, part: slice, out: Any) -> None:
        """As Summed, once all ranks have their gradients there."""
        addends = [addend[part] for addend in self.addends]
        if not self.exact:
            rows = compiled(squares)([bridge.rebased(addend) for addend in addends])
            np.sum(rows.numpy().reshape(-1, BLOCK // ROW), axis=1, dtype=np.float64, out=out)
            return
        for chunk in arrays.chunks(0, part.stop - part.start, CHUNK):
            sums = compiled(add)([bridge.rebased(addend[chunk]) for addend in addends])
            device.squares(sums.numpy(), out[chunk.start // BLOCK:chunk.stop // BLOCK])


def nothing_to_send(then: Then) -> None:
    """Nobody is told of sums: there are none."""


@cache
def compiled(over: Callable[[Sequence[Tensor]], Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    """`add` or `squares`, compiled on its first call."""
    return torch.compile(over, dynamic=True)


def squares(addends: Sequence[Tensor]) -> Tensor:
    """The sum of squares of every ROW elements of the sum of `addends`, float32."""
    rows = add(addends).view(-1, ROW)
    return (rows * rows).sum(-1)
