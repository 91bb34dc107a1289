"""A sum of compressed values over ranks: what `collective.reduce` does, with fewer bytes.

    each rank     values + residual --code--> one message for every rank: that rank's segment
    the owner     decodes everyone's, adds them in float32 in tree order
                  sum + residual --code--> one message to all
    each rank     decodes the sums of all segments

So every value is rounded twice, once by its rank and once, as a sum, by the owner of its segment; nothing is rounded
while it travels, whatever the number of ranks. Both residuals are fed back, so what one step loses the next ones send
(as in 1-bit Adam's compressed allreduce, arXiv 2102.02888, which has no order of its own). A rank sends
2 (size - 1) / size of the encoded buffer. The owner too uses what it decodes, so all ranks end with the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from mpi4py import MPI

from mpilm import bridge
from mpilm.comm import order
from mpilm.comm.devices import Array
from mpilm.comm.transport import ON_HOST, Transport

if TYPE_CHECKING:
    from mpilm.sync.compress._base import Codec

TAG = 201
LARGEST = 1 << 28   # bytes of a message


class Exchange:
    """Sums buffers of `count` float32 values over `comm`, with this rank's residuals.

    Args:
        comm: Used by nobody else while a sum is under way. Every method is collective over it.
        transport: Of the device whose buffers are summed.
    """

    def __init__(self, codec: Codec, comm: MPI.Comm, count: int, transport: Transport = ON_HOST) -> None:
        self.codec, self.comm, self.transport = codec, comm, transport
        self.cut = order.segments(count, comm.size)
        self.mine = self.cut[comm.rank]
        self.steps = order.tree(comm.size)
        self.lost = torch.zeros(count, device=transport.device.torch)
        self.lost_in_sum = torch.zeros_like(self.lost[self.mine])
        self._out = [self._room(piece) for piece in self.cut]
        self._in = [self._room(self.mine) for _ in self.cut]
        self._parts = [torch.empty_like(self.lost_in_sum) for _ in self.cut]

    def _room(self, piece: slice) -> Array:
        return self.transport.device.empty(self.codec.size(piece.stop - piece.start), np.uint8)

    def reduce(self, buffer: Array) -> None:
        """Replace `buffer` by the sum over all ranks, as far as the code can tell it; the same bits on every rank."""
        values = bridge.tensor(buffer, torch.float32)
        for piece, data in zip(self.cut, self._out, strict=True):
            self.codec.squeeze(values[piece], self.lost[piece], data)
        self._swap(self._out, self._in)
        for part, data in zip(self._parts, self._in, strict=True):
            self.codec.decode(data, part)
        for into, other in self.steps:
            self._parts[into].add_(self._parts[other])
        total = self._out[self.comm.rank]
        self.codec.squeeze(self._parts[0], self.lost_in_sum, total)
        self._swap([total] * self.comm.size, self._out)
        for piece, data in zip(self.cut, self._out, strict=True):
            self.codec.decode(data, values[piece])
        if not torch.isfinite(values.sum()):
            self._forget()

    def _swap(self, outgoing: list[Array], incoming: list[Array]) -> None:
        """Message number r of `outgoing` goes to rank r, and what it sent to me into `incoming`[r]."""
        rank, ledger = self.comm.rank, self.transport.ledger()
        for step in range(1, self.comm.size):
            other = (rank - step) % self.comm.size
            for part in _messages(incoming[other]):
                ledger.receive(self.comm, part, source=other, tag=TAG)
        for step in range(1, self.comm.size):
            other = (rank + step) % self.comm.size
            for part in _messages(outgoing[other]):
                ledger.send(self.comm, part, dest=other, tag=TAG)
        incoming[rank][:] = outgoing[rank]
        ledger.wait()

    def _forget(self) -> None:
        """Drop residuals that come from gradients that were not finite, or every step to come would be skipped too.

        All ranks see the same sum, so all do it together."""
        self.lost.zero_()
        self.lost_in_sum.zero_()


def _messages(data: Array) -> list[Array]:
    return [data[start:start + LARGEST] for start in range(0, data.size, LARGEST)]
