"""Recursive halving and doubling: the sum of all ranks in the order of `order.tree`, with the ring's bandwidth.

Stage k of the reduce-scatter: exchange with rank r XOR 2^k. Each keeps one half of what it is responsible for, sends
the other half and adds what it receives; so halves are summed over neighbours first, then over pairs, then over
fours:

    4 ranks:   ((r0 + r1) + (r2 + r3))        the pairs meet at distance 1, the fours at distance 2

After log2(size) stages a rank owns 1/size of the buffer; the same exchanges backwards, received into place, give
everyone everything. The order of a sum does not depend on which rank makes it (a + b is b + a, bit for bit), nor on
where the blocks are cut, so `tree` equals `shared` in reproducible mode, and one rank that sums the same subtrees by
itself.

The number of ranks must be a power of two; there is no such tree over the others without extra traffic.
"""

from __future__ import annotations

from mpi4py import MPI

from mpilm.comm import p2p
from mpilm.comm.collectives._base import Collective
from mpilm.comm.collectives._pipeline import NODE_SEGMENT_BYTES, Pipeline, Stage, segment_bytes
from mpilm.comm.devices import Array
from mpilm.comm.node import Node
from mpilm.comm.transport import ON_HOST, Transport


class Tree(Collective):
    """Sums in tree order over a power of two of ranks."""

    fixed_order = True

    @classmethod
    def why_not(cls, ranks: int) -> str | None:
        """As Collective."""
        if ranks & (ranks - 1) == 0:
            return None
        return f"--sync.collective tree needs a power of two of ranks that sum together, and {ranks} do."

    def __init__(self, comm: MPI.Comm, node: Node, *, reproducible: bool = False,
                 transport: Transport = ON_HOST) -> None:
        super().__init__(comm, node, reproducible=reproducible, transport=transport)
        longest = 2 * NODE_SEGMENT_BYTES    # of whose first exchange is one half
        self._pipeline = Pipeline(self.comm, stages, tag=p2p.TAG_TREE, transport=transport,
                                  block_bytes=min(comm.size * segment_bytes(node, comm, transport), longest))

    def allreduce(self, buffer: Array) -> None:
        """As Collective."""
        self.check(buffer)
        self._pipeline.run(buffer)


def stages(length: int, rank: int, size: int) -> list[Stage]:
    """What `rank` does with a block of `length` elements: log2(size) halvings, then as many doublings."""
    halvings, low, high = [], 0, length
    for distance in (1 << level for level in range(size.bit_length() - 1)):
        middle = low + (high - low) // 2
        lower, upper = slice(low, middle), slice(middle, high)
        keep, give = (upper, lower) if rank & distance else (lower, upper)
        halvings.append(Stage(rank ^ distance, give, rank ^ distance, keep, add=True))
        low, high = keep.start, keep.stop
    doublings = [Stage(step.dest, step.receive, step.source, step.send, add=False) for step in reversed(halvings)]
    return halvings + doublings
