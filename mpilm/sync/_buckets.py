"""Flat memory for parameters, gradients and optimizer state, bucket by bucket.

    gradients[0]   float32, where the collective wants it: summed over my slots, then over all ranks
    gradients[1:]  float32, mine alone: the other partial sums of the binary counter (see _slots.py)
    masters, optimizer states   float32, one copy for all owners; each rank updates its own segment
    weights        what the model computes with (bf16, or the masters themselves), one copy for all owners
    blocks         float64, the sum of squares of every BLOCK gradients, for the global norm

The owners are the ranks among whom the collective divides a reduced buffer: the ranks of a node
that share its memory, or each rank alone with a copy of everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mpilm import bridge
from mpilm.comm.node import Node
from mpilm.comm.order import BLOCK, segments
from mpilm.flat import Flat
from mpilm.sync._layout import Layout, Member
from mpilm.sync._slots import Visit

MASTERS = "model"
# (state name or MASTERS, parameter name, first element, number of elements) -> float32 values
Read = Callable[[str, str, int, int], np.ndarray]


class Bucket:
    """The flat memory of one bucket. Collective over the collective's communicator."""

    def __init__(self, layout: Layout, collective: Any, owners: Node, *, states: Sequence[str],
                 dtype: torch.dtype, num_buffers: int) -> None:
        self.layout, self.collective = layout, collective
        count = layout.count
        self.own = segments(count, owners.comm.size)[owners.comm.rank]
        self.reduced = collective.allocate(count, np.float32)
        partial = [np.zeros(count, np.float32) for _ in range(num_buffers - 1)]
        self.gradients = [torch.from_numpy(buffer) for buffer in [self.reduced, *partial]]
        self.state = {name: owners.allocate_common(count, np.float32) for name in (MASTERS, *states)}
        self.masters = torch.from_numpy(self.state[MASTERS])
        self.weights = self.masters if dtype == torch.float32 else bridge.tensor(
            owners.allocate_common(count, bridge.array_dtype(dtype)), dtype)
        self.blocks = owners.allocate_common(count // BLOCK, np.float64)

    def visit(self, member: Member, visit: Visit, gradient: torch.Tensor | None) -> None:
        """Take in one parameter's gradient of one slot; None means zero."""
        run = slice(member.start, member.start + member.count)
        into = self.gradients[visit.into][run]
        if gradient is None:
            into.mul_(0.0 if visit.fresh else 1.0)
        elif visit.fresh:
            into.copy_(gradient.reshape(-1))
        else:
            into.add_(gradient.reshape(-1))
        for lower in range(visit.into - 1, visit.into - 1 - visit.folds, -1):
            self.gradients[lower][run].add_(self.gradients[lower + 1][run])

    def reduce(self) -> None:
        """Sum my segment over all ranks, and its squares block by block. Collective, in bucket order."""
        self.collective.reduce(self.reduced)
        # One call a block: over several blocks at once NumPy may sum each of them in another order.
        for block in range(self.own.start // BLOCK, self.own.stop // BLOCK):
            values = self.reduced[block * BLOCK:(block + 1) * BLOCK]
            self.blocks[block] = np.einsum("i,i->", values, values)

    def flat(self) -> Flat:
        """My segment, as the update takes it."""
        own = self.own
        states = tuple(torch.from_numpy(array[own]) for name, array in self.state.items() if name != MASTERS)
        return Flat(self.masters[own], self.weights[own], self.gradients[0][own], states, self.layout.decay)

    def load(self, read: Read) -> None:
        """Fill my segment of masters and optimizer state, and round the weights from the masters."""
        for name, array in self.state.items():
            for member, start, stop in self._members_in(self.own):
                first = start - member.start
                array[start:stop] = read(name, member.name, first, stop - start)
        self.weights[self.own].copy_(self.masters[self.own])

    def runs(self, part: int, parts: int) -> list[tuple[str, str, int, np.ndarray]]:
        """(state name, parameter name, first element, values) of one of `parts` shares of everything a resume needs."""
        share = segments(self.layout.count, parts)[part]
        return [(name, member.name, start - member.start, array[start:stop])
                for name, array in self.state.items() for member, start, stop in self._members_in(share)]

    def _members_in(self, share: slice) -> list[tuple[Member, int, int]]:
        """The members that reach into `share`, each with the run they have in common."""
        cuts = [(m, max(share.start, m.start), min(share.stop, m.start + m.count)) for m in self.layout.members]
        return [(member, start, stop) for member, start, stop in cuts if start < stop]
