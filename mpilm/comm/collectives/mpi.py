"""MPI's own allreduce, in place: the yardstick, and the right choice where a network sums by itself.

Long buffers go in pieces of MESSAGE_BYTES, since many libraries count in 32 bits. The order of the sum is the
library's.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpi4py import MPI

from mpilm.comm import arrays, network, order, p2p
from mpilm.comm.collectives._base import Collective
from mpilm.comm.devices import Array
from mpilm.comm.transport import Transport

SCATTER_BYTES = 16 * 2**20  # of a buffer that is scattered at a time; a longer one is copied together for it


class Mpi(Collective):
    """Sums by MPI_Allreduce. It blocks inside MPI: MPI_Iallreduce measured 1.5 to 2.7 times slower."""

    @classmethod
    def lacks(cls, transport: Transport) -> str | None:
        """As Collective."""
        if transport.direct:
            return None
        return (f"--sync.collective mpi gives MPI the memory of {transport.device.title}, which this MPI can't use. "
                "Choose --sync.collective ring, shared or tree (or auto).")

    def allreduce(self, buffer: Array) -> None:
        """As Collective."""
        self.check(buffer)
        self.device.settle()
        for piece in arrays.chunks(0, len(buffer), arrays.MESSAGE_BYTES // buffer.itemsize):
            self.comm.Allreduce(MPI.IN_PLACE, buffer[piece], op=MPI.SUM)
        self._count(2 * buffer.nbytes)

    def reduce_scatter(self, buffer: Array) -> None:
        """As Collective; by MPI_Reduce_scatter, which wants the parts of all segments side by side."""
        self.check(buffer)
        cut = order.segments(len(buffer), self.comm.size)
        length = -(-SCATTER_BYTES // buffer.itemsize // self.comm.size)
        for piece in order.pieces(cut, length):
            counts = [part.stop - part.start for part in piece]
            together = buffer if sum(counts) == len(buffer) else self._side_by_side(buffer, piece)
            mine = self.device.empty(counts[self.comm.rank], buffer.dtype)
            self.device.settle()
            self.comm.Reduce_scatter(together, mine, counts, op=MPI.SUM)
            buffer[piece[self.comm.rank]] = mine
        self._count(buffer.nbytes)

    def allgather(self, buffer: Array) -> None:
        """As Collective; by MPI_Allgatherv."""
        self.check(buffer, allowed=arrays.MOVED)
        self.device.settle()
        cut = order.segments(len(buffer), self.comm.size)
        for piece in order.pieces(cut, arrays.MESSAGE_BYTES // buffer.itemsize // self.comm.size):
            counts, starts = [part.stop - part.start for part in piece], [part.start for part in piece]
            self.comm.Allgatherv(MPI.IN_PLACE, [buffer, (counts, starts)])
        self._count(buffer.nbytes)

    def _side_by_side(self, buffer: Array, parts: Sequence[slice]) -> Array:
        together, start = self.device.empty(sum(part.stop - part.start for part in parts), buffer.dtype), 0
        for part in parts:
            together[start:start + part.stop - part.start] = buffer[part]
            start += part.stop - part.start
        return together

    def _count(self, nbytes: int) -> None:
        """MPI does not tell what it sends; a rank sends so much at least, all segments but one."""
        sent = (self.comm.size - 1) * nbytes // self.comm.size
        p2p.Traffic.sent += sent
        network.line().spend(sent)
