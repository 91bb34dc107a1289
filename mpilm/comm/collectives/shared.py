"""Sums in memory that the ranks of a node share: nothing is sent inside a node.

Every rank's buffer is a part of one block that all ranks of the node have mapped. Rank r of the node owns slice r of
every part:

                 slice 0     slice 1
    part 0      [ . . . . | . . . . ]      owned by the node's rank 0 and rank 1
    part 1      [ . . . . | . . . . ]

    1. barrier: everyone's values are written
    2. rank r: parts[r][slice r] = sum of all parts[..][slice r], in the order of order.tree, in cache-sized chunks
    3. between nodes: the ranks that own the same slice sum it, by a ring or, in reproducible mode, in tree order
    4. allreduce: parts[..][slice r] = that sum, while it is in the cache
    5. barrier: everyone's slices are complete

A rank reads its slice of every part and writes it: as much memory traffic as a plain copy of the buffer. `reduce`
leaves out 4. `reduce_scatter` differs between nodes: there a rank makes its node's sums of the segments that its peers
own, one on every node, and sends each of them its own. Nobody but rank r touches slice r between the barriers, so sums
are made in place.

On a device each rank opens the others' buffers (peers.py), and the same is done in one kernel; a meeting (meet.py)
takes the place of a barrier. Memory in common there is none: each rank owns all of its buffer, and what is gathered
each copies from where it lies.

A buffer that `allocate` did not make goes through a scratch area of bounded size: copy in, sum, copy out, three
chunks under way at a time. What is gathered may be one buffer that all ranks of a node see (`allocate_common`): its
segments come once to every node. Nodes of different sizes: as many ranks of a node sum as the smallest node has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpilm.comm import arrays, order
from mpilm.comm.collectives import ring
from mpilm.comm.collectives._across import Across, SwapNodes
from mpilm.comm.collectives._allocations import Allocations
from mpilm.comm.collectives._base import Collective, Then, nothing_more
from mpilm.comm.devices import Array
from mpilm.comm.meet import Meet
from mpilm.comm.node import Node, SharedMemoryError
from mpilm.comm.peers import Peers
from mpilm.comm.transport import ON_HOST, Transport
from mpilm.log import UserError, warn

T = TypeVar("T")
PIECE_BYTES = 4 * 2**20  # summed between nodes at a time
STAGE_BYTES = 512 * 2**10  # of a foreign buffer at a time; six of them fit in the last-level cache of a core or two


class Shared(Collective):
    """Sums in node-shared memory, for any number of ranks, nodes and elements.

    Attributes:
        owners: The ranks of my node, where they can have memory in common: each holds one slice of a reduced buffer.
    """

    fixed_order = True

    def __init__(self, comm: MPI.Comm, node: Node, *, reproducible: bool = False,
                 transport: Transport = ON_HOST) -> None:
        """As Collective.

        Raises:
            SharedMemoryError: On all ranks of `comm`: a node cannot even share the scratch area.
            UserError: Reproducible mode, and the ranks are not dealt to the nodes in contiguous runs.
        """
        super().__init__(comm, node, reproducible=reproducible, transport=transport)
        if self.device.shares:
            self.owners = node.comm
        self._local = node.comm.Dup()
        self._meet = Meet(self._local, self.device)
        self._opened = None if self.device.shares else Peers(self._local, self.device)
        self._peers = node.peers.Dup()
        self._workers = min(len(ranks) for ranks in node.members)
        self._plan(comm.size, reproducible=reproducible)
        self._allocations = Allocations(self._local.rank, self.device.array)
        self._commons: list[Array] = []
        self._stage_bytes = self.device.grain * STAGE_BYTES
        self._stages = self._agreed(3 * self._stage_bytes, np.uint8)

    def _plan(self, size: int, *, reproducible: bool) -> None:
        """Fix the order of all sums: inside the node, then between nodes."""
        members = self.node.members
        if reproducible and [rank for ranks in members for rank in ranks] != list(range(size)):
            raise UserError(
                "Reproducible mode with --sync.collective shared needs the ranks of a node to be consecutive. "
                "Start with mpirun --map-by slot (srun --distribution=block), or type --sync.collective tree."
            )
        firsts = [ranks[0] if reproducible else 0 for ranks in members]
        leaves = [
            order.partials(size, first, first + len(ranks)) if reproducible else [range(len(ranks))]
            for first, ranks in zip(firsts, members, strict=True)
        ]
        here = self.node.index
        self._sum_local = self.device.local_sum(leaves[here], first=firsts[here], size=self._local.size,
                                                mine=self._local.rank)
        many = len(members) > 1
        by = self.transport
        self._across = Across(self._peers, leaves, size, by) if many and reproducible else None
        self._ring = ring.over(self._peers, by) if many and not reproducible else None
        self._scatter = self._across or Across.over(self._peers, by) if many else None
        self._column = self._peers.allgather(self.comm.rank)
        self._swap = SwapNodes(self.comm, members, by)

    def allocate(self, count: int, dtype: npt.DTypeLike) -> Array:
        """My part of node-shared memory, zeroed; ordinary memory, said so, where a node cannot share so much."""
        try:
            parts = self._agreed(count, dtype)
        except SharedMemoryError as error:
            warn(f"{error} Gradients go through a scratch area instead, which is slower.")
            return self.device.zeros(count, dtype)
        return self._allocations.add(parts)

    def allocate_common(self, count: int, dtype: npt.DTypeLike) -> Array:
        """One buffer for all ranks of a node; ordinary memory, said so, where a node cannot share so much. On a device
        as `allocate`."""
        if self._opened is not None:
            return self.allocate(count, dtype)
        try:
            buffer = self._agree(lambda: self.node.allocate_common(count, dtype))
        except SharedMemoryError as error:
            warn(f"{error} Every rank keeps a copy of its own instead.")
            return arrays.zeros(count, dtype)
        self._commons.append(buffer)
        return buffer

    def allreduce(self, buffer: Array) -> None:
        """As Collective."""
        self._run(buffer, nothing_more, everywhere=True)

    def reduce(self, buffer: Array, then: Then = nothing_more) -> None:
        """As Collective; rank r of `owners` holds order.segments(count, owners.size)[r] of the sum."""
        self._run(buffer, then, everywhere=self._opened is not None)

    def reduce_scatter(self, buffer: Array) -> None:
        """As Collective. Between nodes of different sizes everyone gets everything."""
        if self._workers != max(len(ranks) for ranks in self.node.members):
            self.allreduce(buffer)
            return
        parts, where = self._allocations.find(buffer)
        if not self.check(buffer, where) or where < 0:
            self._through_stages(buffer)
            return
        self._meet_if_opened()
        self._scatter_parts(parts)
        self._meet()

    def allgather(self, buffer: Array) -> None:
        """As Collective; only between the nodes for a buffer that all ranks of a node see."""
        if self._opened is not None:
            self._gather_opened(buffer)
            return
        if not self._is_common(buffer):
            super().allgather(buffer)
            return
        self.check(buffer, allowed=arrays.MOVED)
        self._swap.run(buffer)
        self._meet()

    def _gather_opened(self, buffer: Array) -> None:
        """Copy what the ranks of my node have from where it lies, and what other nodes have from messages."""
        parts, where = self._allocations.find(buffer, arrays.MOVED)
        same = self.check(buffer, where, allowed=arrays.MOVED)
        if not same or where < 0 or self.node.num_nodes > 1:
            super().allgather(buffer)
            return
        self._meet()
        for rank, cut in enumerate(order.segments(len(buffer), self.comm.size)):
            if rank != self.comm.rank and cut.start < cut.stop:
                buffer[cut] = parts[rank][cut]
        self._meet()

    def _meet_if_opened(self) -> None:
        """On a host, `check` was a barrier, and what was written before it is there. On a device it need not be."""
        if self._opened is not None:
            self._meet()

    def _is_common(self, buffer: Array) -> bool:
        """Whether it is what `allocate_common` made: all of it, or it has a place of its own."""
        return arrays.code(buffer, arrays.MOVED) >= 0 and any(
            (arrays.address(buffer), buffer.nbytes) == (arrays.address(known), known.nbytes) for known in self._commons)

    def seen(self, buffer: Array, owner: int) -> Array | None:
        """As Collective."""
        parts, where = self._allocations.find(buffer, arrays.MOVED)
        return parts[owner] if where >= 0 else None

    def free(self) -> None:
        """Give communicators and memory back. Collective over `comm`."""
        if self._opened is not None:
            self._opened.free()
        self._allocations.clear()
        self._commons.clear()
        self._peers.Free()
        self._local.Free()
        super().free()

    def _run(self, buffer: Array, then: Then, *, everywhere: bool) -> None:
        parts, where = self._allocations.find(buffer)
        in_place = self.check(buffer, where) and where >= 0
        at_once = in_place and not everywhere and self._workers == self._local.size
        own = order.segments(len(buffer), self.owners.size)[self.owners.rank]
        if in_place:
            self._meet_if_opened()
            self._sum_parts(parts, then if at_once else nothing_more, everywhere=everywhere)
            self._meet()
            if not everywhere and not at_once:
                self._pull(parts, buffer, own)
                self._meet()
        else:
            self._through_stages(buffer)
        if not at_once:
            then(own)

    def _sum_parts(self, parts: Sequence[Array], then: Then, *, everywhere: bool) -> None:
        """Sum my slice of all parts over all nodes into my part, `then` piece by piece, or into everyone's."""
        if self._local.rank >= self._workers:
            return
        mine, itemsize = parts[self._local.rank], parts[0].itemsize
        chunk_bytes, alone = self._sum_local.chunk_bytes, self.node.num_nodes == 1
        piece_bytes = chunk_bytes if alone else max(chunk_bytes, self.device.grain * PIECE_BYTES)
        own = order.segments(len(mine), self._workers)[self._local.rank]
        for piece in arrays.chunks(own.start, own.stop, piece_bytes // itemsize):
            for chunk in arrays.chunks(piece.start, piece.stop, chunk_bytes // itemsize):
                self._sum_local.sum(parts, chunk, spread=everywhere and alone)
            if not alone:
                self._sum_nodes([parts[place][piece] for place in self._sum_local.places], mine[piece])
                for part in parts if everywhere else ():
                    if part is not mine:
                        part[piece] = mine[piece]
            then(piece)

    def _scatter_parts(self, parts: Sequence[Array]) -> None:
        """Sum my segment of all parts over all nodes into my part; on the way, my node's sums of my peers' segments."""
        whole = order.segments(len(parts[0]), self.comm.size)
        cut = [whole[rank] for rank in self._column]
        sums = [parts[place] for place in self._sum_local.places]
        chunk_bytes = self._sum_local.chunk_bytes
        for piece in order.pieces(cut, max(chunk_bytes, self.device.grain * PIECE_BYTES) // parts[0].itemsize):
            for part in piece:
                for chunk in arrays.chunks(part.start, part.stop, chunk_bytes // parts[0].itemsize):
                    self._sum_local.sum(parts, chunk)
            if self._scatter:
                self._scatter.scatter(sums, piece, parts[self._local.rank])

    def _sum_nodes(self, values: Sequence[Array], out: Array) -> None:
        """Sum this node's values over the nodes into `out`."""
        if self._across:
            self._across.sum(values, out)
        if self._ring:
            self._ring.run(out)

    def _pull(self, parts: Sequence[Array], out: Array, wanted: slice) -> None:
        """Copy the `wanted` elements of the sum from the parts of the ranks that made it."""
        for part, cut in zip(parts, order.segments(len(out), self._workers), strict=False):
            both = slice(max(cut.start, wanted.start), min(cut.stop, wanted.stop))
            if both.start < both.stop:
                out[both] = part[both]

    def _through_stages(self, buffer: Array) -> None:
        """Sum any buffer through the scratch area: at tick t chunk t goes in, t-1 is summed, t-2 comes out."""
        chunks = list(arrays.chunks(0, len(buffer), self._stage_bytes // buffer.itemsize))
        for tick in range(len(chunks) + 2):
            if tick < len(chunks):
                self._stage(buffer, chunks[tick], tick)[self._local.rank][:] = buffer[chunks[tick]]
            if 1 <= tick <= len(chunks):
                self._sum_parts(self._stage(buffer, chunks[tick - 1], tick - 1), nothing_more, everywhere=False)
            if tick >= 2:
                out = buffer[chunks[tick - 2]]
                self._pull(self._stage(buffer, chunks[tick - 2], tick - 2), out, slice(0, len(out)))
            self._meet()

    def _stage(self, buffer: Array, chunk: slice, turn: int) -> list[Array]:
        """Everyone's part of the third of the scratch area that this turn uses."""
        start = turn % 3 * self._stage_bytes
        stretch = slice(start, start + (chunk.stop - chunk.start) * buffer.itemsize)
        return [part[stretch].view(buffer.dtype) for part in self._stages]

    def _agreed(self, count: int, dtype: npt.DTypeLike) -> list[Array]:
        allocate = self.node.allocate if self._opened is None else self._opened.allocate
        return self._agree(lambda: allocate(count, dtype))

    def _agree(self, allocate: Callable[[], T]) -> T:
        """Memory on all nodes or on none. Raises SharedMemoryError on all ranks of `comm`."""
        memory: list[T] = []
        problem = ""
        try:
            memory.append(allocate())
        except SharedMemoryError as error:
            problem = str(error)
        problems = [text for text in self.comm.allgather(problem) if text]
        if problems:
            raise SharedMemoryError(problems[0])
        return memory[0]
