"""A bucket of a replica that trains by itself for a while, and what brings the replicas together again.

    anchor       what the replicas agreed on last, the same bits on all of them
    masters      mine, some local steps away from it
    difference   anchor - masters, times my share of the slots: summed over ranks it is the average difference

    anchor  <-  an outer step (DiLoCo, arXiv 2311.08105) against the average difference
    masters <-  anchor, and whatever I have moved on since the difference was taken

An outer step with learning rate 1 and without momentum makes the anchor the average of all masters.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpilm import bridge
from mpilm.comm.arrays import fetch
from mpilm.comm.devices import Array
from mpilm.comm.order import BLOCK, segments
from mpilm.sync._buckets import MASTERS, Bucket, Read, Run, runs_of
from mpilm.sync._compressed import Compress
from mpilm.sync._gradients import Reduce, Whole, afterwards
from mpilm.sync._layout import Layout
from mpilm.sync._slots import Visit

DRIFT, MOMENTUM = "outer_drift", "outer_momentum"   # states in a checkpoint: zero is where a run begins
ANCHOR, TAKEN, SUM = "outer_anchor", "outer_taken", "outer_sum"     # only beside replicas' own


@dataclass(frozen=True)
class Outer:
    """Stochastic gradient descent with Nesterov momentum, as torch.optim.SGD has it, for differences as gradients."""

    lr: float
    momentum: float

    def step(self, anchor: Tensor, difference: Tensor, velocity: Tensor) -> None:
        """Move `anchor`; `velocity` has as many elements, or none without momentum."""
        if self.momentum:
            velocity.mul_(self.momentum).add_(difference)
            anchor.sub_(velocity, alpha=self.lr * self.momentum)
        anchor.sub_(difference, alpha=self.lr)


class Apart(Bucket):
    """Collective over the collective's communicator, like `average` and `runs`.

    Args:
        reduce: Sums gradients, in steps that are not local.
        compress: How differences are summed.
        share: Of the slots of a step that are mine.

    Attributes:
        difference: Given to `total` in the communication thread between `take` and `merge`.
    """

    def __init__(self, layout: Layout, collective: Any, reduce: Reduce, compress: Compress, outer: Outer, *,
                 share: float, states: Sequence[str], dtype: torch.dtype, visits: Sequence[Visit],
                 repeated: Collection[str], compiled: bool) -> None:
        count, own, device = layout.count, slice(0, layout.count), collective.device
        super().__init__(layout, own, Whole(layout, collective.allocate, reduce, own, visits), repeated, device,
                         compiled=compiled)
        self.collective, self.outer, self.share = collective, outer, share
        self.masters, self.anchor = (torch.zeros(count, device=device.torch) for _ in range(2))
        self.flat = self.shard = self.masters if dtype == torch.float32 else torch.zeros_like(self.masters, dtype=dtype)
        self.states = {name: device.zeros(count, np.float32) for name in states}
        self.velocity = torch.zeros(count if outer.momentum else 0, device=device.torch)
        self.squares = device.zeros(count // BLOCK, np.float64)
        self.difference = collective.allocate(count, np.float32)
        self.away = bridge.tensor(self.difference, torch.float32)
        self.total = compress(layout, collective, afterwards(collective.allreduce))
        self.taken: Tensor | None = None    # the masters as they were when the difference was taken

    def take(self) -> None:
        """Write down how far I have come from the anchor."""
        torch.sub(self.anchor, self.masters, out=self.away).mul_(self.share)
        self.taken = self.masters.clone()

    def merge(self) -> None:
        """The difference is summed: an outer step, and back to the anchor but for what I moved since `take`."""
        assert self.taken is not None, "no difference was taken"
        self._merge(self.taken, self.own)
        self.taken = None
        self.round()

    def _merge(self, taken: Tensor, part: slice) -> None:
        self.outer.step(self.anchor[part], self.away[part], self.velocity[part])
        self.masters[part].sub_(taken[part]).add_(self.anchor[part])

    def agree(self) -> None:
        """All replicas have the same masters: they are the anchor."""
        self.anchor.copy_(self.masters)

    def arrays(self) -> dict[str, Array]:
        """As Bucket, where the anchor stands for how far the masters are from it."""
        velocity = {MOMENTUM: bridge.array(self.velocity)} if self.outer.momentum else {}
        return {**super().arrays(), DRIFT: bridge.array(self.anchor), **velocity}

    def load(self, read: Read) -> None:
        """As Bucket: the average of the replicas that there were."""
        super().load(read)
        self.anchor.add_(self.masters)

    def load_mine(self, read: Read) -> None:
        """After `load`: what this replica left, of as many, where there is any, instead of the average."""
        mine = np.zeros(self.layout.count, np.float32)
        self.fill(mine, self._mine(MASTERS), read)
        if mine.any():  # nobody's weights are all zero
            self.masters.copy_(torch.from_numpy(mine))
            self.round()
            self._load_others(read)

    def _load_others(self, read: Read) -> None:
        """What my own masters need beside them."""
        self.fill(bridge.array(self.anchor), self._everyones(ANCHOR), read)
        for name, array in self.states.items():
            self.fill(array, self._mine(name), read)
        taken = torch.zeros_like(self.masters)
        self.fill(bridge.array(taken), self._mine(TAKEN), read)
        spans = [slice(start, stop) for _, start, stop in self.layout.members_in(self.own)]
        travelling = [span for span in spans if taken[span].any()]
        if not travelling:
            return
        self.fill(self.difference, self._everyones(SUM), read)
        if travelling == spans:
            self.taken = taken
            return
        for span in travelling:     # parameters travelled in other company then: whoever has arrived does not wait
            self._merge(taken, span)
        self.round()

    def _mine(self, name: str) -> str:
        """A state's name in a checkpoint, where it is this replica's own."""
        return f"{name}_{self.collective.comm.rank}_of_{self.collective.comm.size}"

    def _everyones(self, name: str) -> str:
        """Where it is the same on all, and goes with states that are not."""
        return f"{name}_of_{self.collective.comm.size}"

    def average(self) -> Tensor:
        """The average of all replicas' masters, with the bits that `runs` has; the anchor, to the bit, where nobody has
        moved from it."""
        difference = self._part_of(self.anchor - self.masters)
        self.collective.reduce_scatter(difference)
        self.collective.allgather(difference)
        return self.anchor - bridge.tensor(difference, torch.float32)

    def runs(self, *, together: bool) -> list[Run]:
        """This rank's share of everything a resume needs, averaged over the replicas; `together`: all have the same."""
        mine = self._share()
        arrays = {name: array[mine] for name, array in self.arrays().items()}
        if together:
            arrays[DRIFT] = np.zeros(len(arrays[DRIFT]), np.float32)
        else:
            anchor = fetch(arrays[DRIFT])
            arrays[MASTERS] = anchor - self._sum(self.anchor - self.masters, mine)
            arrays[DRIFT] = anchor - arrays[MASTERS]
            arrays |= {name: self._sum(bridge.tensor(array, torch.float32), mine)
                       for name, array in self.states.items()}
        return runs_of(self.layout, mine, arrays)

    def own_runs(self) -> list[Run]:
        """What this replica, and no other, needs to go on as if it had not stopped; a difference that is on its way
        has been summed."""
        mine, share = {MASTERS: bridge.array(self.masters), **self.states}, self._share()
        everyones = {ANCHOR: bridge.array(self.anchor)[share]}
        if self.taken is not None:
            mine[TAKEN], everyones[SUM] = bridge.array(self.taken), self.difference[share]
        return [*runs_of(self.layout, self.own, {self._mine(name): array for name, array in mine.items()}),
                *runs_of(self.layout, share, {self._everyones(name): array for name, array in everyones.items()})]

    def _share(self) -> slice:
        comm = self.collective.comm
        return segments(self.layout.count, comm.size)[comm.rank]

    def _part_of(self, values: Tensor) -> Array:
        """What I add to the average of everyone's `values`, at full length."""
        part = self.collective.device.empty(self.layout.count, np.float32)
        torch.mul(values, self.share, out=bridge.tensor(part, torch.float32))
        return part

    def _sum(self, values: Tensor, mine: slice) -> np.ndarray:
        """Segment `mine` of the average."""
        part = self._part_of(values)
        self.collective.reduce_scatter(part)
        return fetch(part[mine]).copy()
