"""Gradients that nobody sums before they are used: the update of a segment reads what every rank has there.

    rank 0's gradients   [ segment 0 | segment 1 ]     bf16, as the backward pass made them
    rank 1's gradients   [ segment 0 | segment 1 ]
    rank r's update      masters, states and weights of segment r <- both ranks' gradients of segment r

Where ranks see each other's memory, a sum that is written down is written to be read once. Without it a step of two
ranks moves a quarter fewer bytes, and memory is what additions and updates wait for. Sums are float32, made twice: for
the norm, and for the update.

That takes an update that is compiled, so that a sum stays in registers; a step of one slot, because slots are added up
in float32; no bits to be kept, which are those of a written sum; no compression; ranks that are all on one node, and
not too many, because a core reads so many streams at once; and nobody who outlives others and finishes their updates.
The rows of a sparse gradient are summed in float32, as ever, and then rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpilm import bridge
from mpilm.comm.collectives import Then
from mpilm.comm.devices import ROW, Device
from mpilm.comm.order import BLOCK
from mpilm.comm.worker import Call
from mpilm.flat import MOST_ADDENDS, add
from mpilm.sync._gradients import put
from mpilm.sync._layout import Layout, Member


class Unsummed:
    """Gradients of one slot a step, in the dtype of the weights.

    Args:
        mine: Those that I collect.
        addends: Everyone's, as far as my segment goes.
    """

    def __init__(self, mine: Tensor, addends: Sequence[Tensor]) -> None:
        self.mine, self.addends, self.nbytes = mine, tuple(addends), mine.nbytes

    @classmethod
    def build(cls, layout: Layout, collective: Any, own: slice, dtype: torch.dtype) -> Unsummed | None:
        """Over the owners of a collective; None where they do not see each other's memory, or are too many. Collective
        over it."""
        if collective.owners.size > MOST_ADDENDS:
            return None
        mine = collective.allocate(layout.count, bridge.array_dtype(dtype))
        everyone = [collective.seen(mine, owner) for owner in range(collective.owners.size)]
        if any(one is None for one in everyone):
            return None
        return cls(bridge.tensor(mine, dtype), [bridge.tensor(one, dtype)[own] for one in everyone])

    def visit(self, member: Member, slot: int, gradient: Tensor | None) -> None:
        """As Gradients."""
        put(gradient, self.mine[member.start:member.start + member.count])

    def depart(self, slot: int) -> Callable[[Then], None]:
        """As Gradients: they stay where they are."""
        return nothing_to_send

    def departed(self, slot: int, future: Call) -> None:
        """As Gradients."""

    def squares(self, device: Device, part: slice, out: Any) -> None:
        """As Summed, once all ranks have their gradients there."""
        rows = compiled_squares()([bridge.rebased(addend[part]) for addend in self.addends])
        np.sum(rows.numpy().reshape(-1, BLOCK // ROW), axis=1, dtype=np.float64, out=out)


def nothing_to_send(then: Then) -> None:
    """Nobody is told of sums: there are none."""


@cache
def compiled_squares() -> Callable[[Sequence[Tensor]], Tensor]:
    """`squares`, compiled on its first call."""
    return torch.compile(squares, dynamic=True)


def squares(addends: Sequence[Tensor]) -> Tensor:
    """The sum of squares of every ROW elements of the sum of `addends`, float32."""
    rows = add(addends).view(-1, ROW)
    return (rows * rows).sum(-1)
