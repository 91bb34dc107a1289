"""MPI's own allreduce, in place: the yardstick, and the right choice where a network sums by itself.

Long buffers go in pieces of MESSAGE_BYTES, since many libraries count in 32 bits. The order of the sum is the
library's.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

from mpilm.comm import arrays, network, order, p2p
from mpilm.comm.collectives._base import Collective

SCATTER_BYTES = 16 * 2**20  # of a buffer that is scattered at a time; a longer one is copied together for it


class Mpi(Collective):
    """Sums by MPI_Allreduce. It blocks inside MPI: MPI_Iallreduce measured 1.5 to 2.7 times slower."""

    def allreduce(self, buffer: np.ndarray) -> None:
        """As Collective."""
        self.check(buffer)
        for piece in arrays.chunks(0, len(buffer), arrays.MESSAGE_BYTES // buffer.itemsize):
            self.comm.Allreduce(MPI.IN_PLACE, buffer[piece], op=MPI.SUM)
        self._count(2 * buffer.nbytes)

    def reduce_scatter(self, buffer: np.ndarray) -> None:
        """As Collective; by MPI_Reduce_scatter, which wants the parts of all segments side by side."""
        self.check(buffer)
        cut = order.segments(len(buffer), self.comm.size)
        length = -(-SCATTER_BYTES // buffer.itemsize // self.comm.size)
        for piece in order.pieces(cut, length):
            counts = [part.stop - part.start for part in piece]
            together = buffer if sum(counts) == len(buffer) else np.concatenate([buffer[part] for part in piece])
            mine = np.empty(counts[self.comm.rank], buffer.dtype)
            self.comm.Reduce_scatter(together, mine, counts, op=MPI.SUM)
            buffer[piece[self.comm.rank]] = mine
        self._count(buffer.nbytes)

    def allgather(self, buffer: np.ndarray) -> None:
        """As Collective; by MPI_Allgatherv."""
        self.check(buffer, allowed=arrays.MOVED)
        cut = order.segments(len(buffer), self.comm.size)
        for piece in order.pieces(cut, arrays.MESSAGE_BYTES // buffer.itemsize // self.comm.size):
            counts, starts = [part.stop - part.start for part in piece], [part.start for part in piece]
            self.comm.Allgatherv(MPI.IN_PLACE, [buffer, (counts, starts)])
        self._count(buffer.nbytes)

    def _count(self, nbytes: int) -> None:
        """MPI does not tell what it sends; a rank sends so much at least, all segments but one."""
        sent = (self.comm.size - 1) * nbytes // self.comm.size
        p2p.Traffic.sent += sent
        network.line().spend(sent)
