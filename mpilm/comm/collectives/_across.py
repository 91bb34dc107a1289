"""Sums in tree order by messages from everyone to everyone, between nodes and elsewhere: each peer gathers one part of
everyone's values, adds, and hands it round.

    values      every node brings the sums of its own subtrees (one, when its ranks are a whole subtree)
    stage 1     my part of every node's values comes to me: size-1 messages each way
    add         in the order that `order.tree` has above these subtrees
    stage 2     the sums of my part go to everyone

A rank sends 2 (size-1)/size of the buffer in all, as in a ring, but the order of the sum is the tree's for any number
of nodes. The messages are size-1 instead of one at a time, which the few hundred nodes of a job can bear.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from mpi4py import MPI

from mpilm.comm import arrays, order, p2p
from mpilm.comm.devices import Array
from mpilm.comm.transport import ON_HOST, Transport


class Across:
    """Sums over one rank of every node; `over` is the same for nodes of one rank each.

    Args:
        peers: One rank of every node, in the order of the nodes.
        leaves: For every node, the subtrees of order.tree(size) that it has summed by itself.
        size: Ranks in all.
        transport: Of the arrays.
    """

    def __init__(self, peers: MPI.Comm, leaves: Sequence[Sequence[range]], size: int,
                 transport: Transport = ON_HOST) -> None:
        self.peers, self.transport = peers, transport
        self.owner = [index for index, mine in enumerate(leaves) for _ in mine]
        self.steps = order.tree_of(size, [leaf for mine in leaves for leaf in mine])

    @classmethod
    def over(cls, comm: MPI.Comm, transport: Transport = ON_HOST) -> Across:
        """Every rank of `comm` has one value; they are summed in the order of order.tree."""
        return cls(comm, [[range(rank, rank + 1)] for rank in range(comm.size)], comm.size, transport)

    def sum(self, values: Sequence[Array], out: Array) -> None:
        """Put the sum over all nodes into `out`, which may be one of `values`. Collective over `peers`.

        Args:
            values: This node's subtree sums, equally long 1-D arrays.
            out: As long as they are.
        """
        cut = order.segments(len(out), self.peers.size)
        self.scatter(values, cut, out)
        self.spread(out, [cut])

    def scatter(self, values: Sequence[Array], cut: Sequence[slice], out: Array) -> None:
        """Stage 1 alone: out[cut[r]] becomes the sum on peer r. Collective over `peers`."""
        total = self._gather(values, cut)
        for into, other in self.steps:
            np.add(total[into], total[other], out=total[into])
        out[cut[self.peers.rank]] = total[0]

    def spread(self, out: Array, cuts: Iterable[Sequence[slice]]) -> None:
        """Stage 2 alone: out[cut[r]] of peer r goes to everyone, for every cut. Collective over `peers`."""
        ledger = self.transport.ledger()
        for cut in cuts:
            for rank in self._others():
                ledger.receive(self.peers, out[cut[rank]], source=rank, tag=p2p.TAG_ACROSS)
                ledger.send(self.peers, out[cut[self.peers.rank]], dest=rank, tag=p2p.TAG_ACROSS)
        ledger.wait()

    def _gather(self, values: Sequence[Array], cut: Sequence[slice]) -> list[Array]:
        """My part of every leaf's value, in the order of the leaves; a copy, so that it can be added to."""
        mine, own = cut[self.peers.rank], iter(values)
        ledger, total = self.transport.ledger(), []
        for rank in self.owner:
            if rank == self.peers.rank:
                total.append(next(own)[mine].copy())
            else:
                total.append(self.transport.device.empty(mine.stop - mine.start, values[0].dtype))
                ledger.receive(self.peers, total[-1], source=rank, tag=p2p.TAG_ACROSS)
        for rank in self._others():
            for value in values:
                ledger.send(self.peers, value[cut[rank]], dest=rank, tag=p2p.TAG_ACROSS)
        ledger.wait()
        return total

    def _others(self) -> list[int]:
        """The other peers, beginning after me, so that not everyone starts with the same one."""
        return [(self.peers.rank + step) % self.peers.size for step in range(1, self.peers.size)]


class SwapNodes:
    """Hands segments round between nodes whose ranks share one buffer: each comes to every other node once.

    Args:
        comm: All ranks.
        members: For every node, its ranks.
        transport: Of the buffer.
    """

    def __init__(self, comm: MPI.Comm, members: Sequence[Sequence[int]], transport: Transport = ON_HOST) -> None:
        self.comm, self.transport = comm, transport
        here = next(ranks for ranks in members if comm.rank in ranks)
        mine = here.index(comm.rank)
        others = [ranks for ranks in members if ranks is not here]
        self.to = [ranks[mine % len(ranks)] for ranks in others]
        self.of = [rank for ranks in others for place, rank in enumerate(ranks) if place % len(here) == mine]

    def run(self, buffer: Array) -> None:
        """Put every node's segments of `buffer` in their places on the others. Collective over `comm`."""
        cut = order.segments(len(buffer), self.comm.size)
        ledger = self.transport.ledger()
        for piece in order.pieces(cut, arrays.MESSAGE_BYTES // buffer.itemsize):
            for rank in self.of:
                ledger.receive(self.comm, buffer[piece[rank]], source=rank, tag=p2p.TAG_ACROSS)
            for rank in self.to:
                ledger.send(self.comm, buffer[piece[self.comm.rank]], dest=rank, tag=p2p.TAG_ACROSS)
        ledger.wait()
