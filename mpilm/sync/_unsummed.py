"""Gradients that nobody sums before they are used: the update of a segment reads what every rank has there.

    rank 0, slot 0   [ segment 0 | segment 1 ]     bf16, as the backward pass made them
            slot 1   [ segment 0 | segment 1 ]
    rank 1, slot 2   [ segment 0 | segment 1 ]
            slot 3   [ segment 0 | segment 1 ]
    rank r's update  masters, states and weights of segment r <- all slots' gradients of segment r

Where ranks see each other's memory, a sum that is written down is written to be read once. Without it a step of two
ranks moves a quarter fewer bytes, and memory is what additions and updates wait for. Sums are float32, along the tree
over all slots, and made twice: for the norm, and for the update. So all bits are those of written sums.

That takes an update that is compiled, so that a sum stays in registers; as many slots on every rank, and no more memory
for them than for their sum; no compression; ranks that are all on one node; not too many addends, because a core reads
so many streams at once; and nobody who outlives others and finishes their updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpilm import bridge
from mpilm.comm.collectives import Then
from mpilm.comm.worker import Call
from mpilm.sync._gradients import put
from mpilm.sync._layout import Layout, Member


class Unsummed:
    """Gradients in the dtype of the weights, which is not float32.

    Args:
        mine: Those that I collect, slot by slot.
        addends: Everyone's, as far as my segment goes, rank by rank.
    """

    def __init__(self, mine: Sequence[Tensor], addends: Sequence[Tensor]) -> None:
        self.mine, self.addends, self.nbytes = mine, tuple(addends), sum(slot.nbytes for slot in mine)

    @classmethod
    def build(cls, layout: Layout, collective: Any, own: slice, *, dtype: torch.dtype,
              num_slots: int) -> Unsummed | None:
        """Over the owners of a collective, each of so many slots; None where they do not see each other's memory.
        Collective over it."""
        mine = collective.allocate(num_slots * layout.count, bridge.array_dtype(dtype))
        everyone = [collective.seen(mine, owner) for owner in range(collective.owners.size)]
        if any(one is None for one in everyone):
            return None
        slots = [bridge.tensor(one, dtype).view(num_slots, -1) for one in everyone]
        return cls(list(bridge.tensor(mine, dtype).view(num_slots, -1)), [slot[own] for one in slots for slot in one])

    def visit(self, member: Member, slot: int, gradient: Tensor | None) -> None:
        """As Gradients."""
        put(gradient, self.mine[slot][member.start:member.start + member.count])

    def depart(self, slot: int) -> Callable[[Then], None]:
        """As Gradients: they stay where they are."""
        return nothing_to_send

    def departed(self, slot: int, future: Call) -> None:
        """As Gradients."""


def nothing_to_send(then: Then) -> None:
    """Nobody is told of sums: there are none."""
