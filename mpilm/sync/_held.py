"""A server's part of a bucket: masters, optimizer states, and a place for the gradients of every worker.

Places of workers on the same node are the workers' own: sums are made there, where a worker does not look again before
it has pulled what came of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI

from mpilm import bridge
from mpilm.comm import arrays, order, p2p
from mpilm.comm.order import BLOCK
from mpilm.comm.roles import Roles
from mpilm.flat import Update
from mpilm.sync._buckets import Segment
from mpilm.sync._compressed import Compress
from mpilm.sync._gradients import Written
from mpilm.sync._layout import Layout
from mpilm.sync._pushes import Arrival
from mpilm.sync._staleness import Rule

TOGETHER = 16   # blocks that are summed over workers and squared while they are in the cache


@dataclass
class Arrived(Written):
    """Gradients that were received: as an update takes them."""

    own: torch.Tensor
    nbytes: int

    @property
    def values(self) -> np.ndarray:
        """As Summed."""
        found: np.ndarray = self.own.numpy()
        return found


class Held(Segment):
    """The segment of a bucket that this server holds.

    Args:
        states: Names of the update's states.
        dtype: What weights are sent in.
        rule: What is done about old gradients.
        compress: What they come as.
        compiled: The update is.
    """

    def __init__(self, layout: Layout, roles: Roles, rule: Rule, compress: Compress, *, states: Sequence[str],
                 dtype: torch.dtype, compiled: bool) -> None:
        super().__init__(layout, order.segments(layout.count, roles.servers)[roles.comm.rank], compiled=compiled)
        count = self.own.stop - self.own.start
        self.roles, self.rule, self.compress = roles, rule, compress
        places = roles.places(layout.count, wanted=compress.way is None)
        self.incoming = [Arrival(arrays.zeros(count, np.float32) if place is None else place[self.own],
                                 layout.runs_in(self.own), compress.codec, seen=place is not None) for place in places]
        self.requests: list[list[MPI.Request]] = [[] for _ in self.incoming]
        self.sends = p2p.Ledger()
        self.masters = torch.from_numpy(arrays.zeros(count, np.float32))
        self.array = (self.masters.numpy() if dtype == torch.float32
                      else arrays.zeros(count, bridge.array_dtype(dtype)))
        self.shard = bridge.tensor(self.array, dtype)
        self.states = {name: arrays.zeros(count, np.float32) for name in states}
        self.squares = np.zeros(count // BLOCK)
        self.pulled = [torch.zeros(count if rule.remembers else 0) for _ in self.incoming]

    def expect(self, worker: int) -> None:
        """Begin to receive a worker's next gradients."""
        self.requests[worker] = [
            self.roles.comm.Irecv(part, source=self.roles.rank(worker), tag=p2p.TAG_PUSH)
            for part in self.incoming[worker].messages(coded=self.compress.begun)]

    def give_up(self, worker: int) -> None:
        """Receive nothing from a worker that stops here."""
        for request in self.requests[worker]:
            request.Cancel()
        p2p.wait(self.requests[worker])

    def collect(self, members: Sequence[int], *, stale: bool) -> None:
        """Wait for the gradients of `members`, and sum them along the tree over workers."""
        p2p.wait([request for worker in members for request in self.requests[worker]])
        parts = [self.incoming[worker].take() for worker in members]
        self.gradients = Arrived(torch.from_numpy(parts[0]), parts[0].nbytes)
        if stale and self.rule.remembers:
            self.rule.correct(self.gradients.own, self.masters, self.pulled[members[0]])
        steps = order.tree(len(parts))
        for first in range(0, self.squares.size, TOGETHER):
            run = slice(first * BLOCK, (first + TOGETHER) * BLOCK)
            for into, other in steps:
                np.add(parts[into][run], parts[other][run], out=parts[into][run])
            if not self.squared.late:
                self.square(slice(self.own.start + run.start, self.own.start + run.stop))
        self.square_late()

    def update(self, update: Update, scale: float | None) -> None:
        """Apply what was collected, once nobody reads the weights of before; nothing where `scale` is None."""
        self.sends.wait()
        if scale is not None:
            for flat in self.flats():
                update.apply(flat, scale)

    def send(self, workers: Sequence[int]) -> None:
        """Begin to send the weights; they do not change before `sends` are through."""
        for worker in workers:
            if self.rule.remembers:
                self.pulled[worker].copy_(self.masters)
            for part in arrays.messages(self.array):
                self.sends.send(self.roles.comm, part, dest=self.roles.rank(worker), tag=p2p.TAG_PULL)

    @property
    def nbytes(self) -> dict[str, int]:
        """Held, by what for."""
        apart = self.array.nbytes if self.shard.data_ptr() != self.masters.data_ptr() else 0
        return {"weights": apart + sum(pulled.nbytes for pulled in self.pulled), "masters": self.masters.nbytes,
                "optimizer": sum(state.nbytes for state in self.states.values()),
                "gradients": sum(arrival.nbytes for arrival in self.incoming)}
