"""Ring allreduce: reduce-scatter, then allgather, each rank talking to its two neighbours only.

A block is cut into `size` segments. Rank r sends to r+1 and receives from r-1. With three ranks and segments a, b, c:

    reduce-scatter          sends   receives and adds              afterwards complete on
      stage 0   rank 0        a        c                             rank 0: b
                rank 1        b        a                             rank 1: c
                rank 2        c        b                             rank 2: a
      stage 1   rank 0        c (r0+r2)   b (r1+r2)
                ...
    allgather: two more stages pass the complete segments around, received into place.

Invariant: before stage s of the reduce-scatter, segment (r - s) mod size of rank r holds the sum over ranks r-s .. r.
After size-1 stages rank r owns the total of segment (r+1) mod size. Every segment is summed along one path and then
copied, so all ranks hold the same bits. A rank sends 2 (size-1)/size of the buffer in all, the least possible
(Patarasuk and Yuan 2009). A ring of one rank has no stages.

A reduce-scatter or an allgather by itself is one of these phases, over segments that lie as `order.segments` cuts them.

Long buffers are cut into blocks, of which two are under way at a time (_pipeline.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpi4py import MPI

from mpilm.comm import arrays, order, p2p
from mpilm.comm.collectives._base import Collective
from mpilm.comm.collectives._pipeline import SEGMENT_BYTES, Pipeline, Stage, segment_bytes
from mpilm.comm.devices import Array
from mpilm.comm.node import Node
from mpilm.comm.transport import ON_HOST, Transport

Phase = Callable[[Sequence[slice], int], list[Stage]]  # (everyone's segments, rank) -> its stages


class Ring(Collective):
    """Sums along the ring of all ranks, for any number of ranks and elements."""

    def __init__(self, comm: MPI.Comm, node: Node, *, reproducible: bool = False,
                 transport: Transport = ON_HOST) -> None:
        super().__init__(comm, node, reproducible=reproducible, transport=transport)
        self.segment_bytes = segment_bytes(node, comm, transport)
        self._pipeline = Pipeline(self.comm, stages, tag=p2p.TAG_RING, transport=transport,
                                  block_bytes=comm.size * self.segment_bytes)

    def allreduce(self, buffer: Array) -> None:
        """As Collective."""
        self.check(buffer)
        self._pipeline.run(buffer)

    def reduce_scatter(self, buffer: Array) -> None:
        """As Collective."""
        self.check(buffer)
        self._play(buffer, scatter_stages)

    def allgather(self, buffer: Array) -> None:
        """As Collective."""
        self.check(buffer, allowed=arrays.MOVED)
        self._play(buffer, gather_stages)

    def _play(self, buffer: Array, stages: Phase) -> None:
        """One phase over all of `buffer`, a block of it at a time."""
        cut = order.segments(len(buffer), self.comm.size)
        self._pipeline.play([(buffer[:], stages(piece, self.comm.rank))
                             for piece in order.pieces(cut, self.segment_bytes // buffer.itemsize)])


def over(comm: MPI.Comm, transport: Transport = ON_HOST) -> Pipeline:
    """The ring over the ranks of `comm`, which are on different nodes."""
    return Pipeline(comm, stages, tag=p2p.TAG_RING, transport=transport,
                    block_bytes=comm.size * transport.device.grain * SEGMENT_BYTES)


def stages(length: int, rank: int, size: int) -> list[Stage]:
    """What `rank` does with a block of `length` elements: size-1 stages of reduce-scatter, size-1 of allgather."""
    cut = order.segments(length, size)
    right, left = (rank + 1) % size, (rank - 1) % size
    return [
        Stage(right, cut[(rank - turn) % size], left, cut[(rank - turn - 1) % size], add=turn < size - 1)
        for turn in range(2 * (size - 1))
    ]


def scatter_stages(cut: Sequence[slice], rank: int) -> list[Stage]:
    """The reduce-scatter after which `rank` has the sum of cut[rank]."""
    size = len(cut)
    return [Stage((rank + 1) % size, cut[(rank - turn - 1) % size], (rank - 1) % size, cut[(rank - turn - 2) % size],
                  add=True) for turn in range(size - 1)]


def gather_stages(cut: Sequence[slice], rank: int) -> list[Stage]:
    """The allgather that begins with every rank's own cut[rank]."""
    size = len(cut)
    return [Stage((rank + 1) % size, cut[(rank - turn) % size], (rank - 1) % size, cut[(rank - turn - 1) % size],
                  add=False) for turn in range(size - 1)]
