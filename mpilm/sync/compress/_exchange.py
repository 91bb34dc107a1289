"""A sum of compressed values over ranks: what `collective.reduce` does, with fewer bytes.

    each rank     values + residual --code--> a message for every rank: of that rank's segment
    the owner     decodes everyone's, adds them in float32 in tree order
                  sum + residual --code--> a message to all
    each rank     decodes the sums of all segments

So every value is rounded twice, once by its rank and once, as a sum, by the owner of its segment; nothing is rounded
while it travels, whatever the number of ranks. Both residuals are fed back, so what one step loses the next ones send
(as in 1-bit Adam's compressed allreduce, arXiv 2102.02888, which has no order of its own). A rank sends
2 (size - 1) / size of the encoded buffer, or less (`_parcels.py`). The owner too uses what others decode, so all ranks
end with the same bits.

All of this is done a piece of every segment at a time, so that messages travel while codes are made, and three pieces
are under way:

    turn     0         1         2         3
             send 0    send 1    send 2    send 3
                       sum 0     sum 1     sum 2
                                 take 0    take 1
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from mpi4py import MPI

from mpilm import bridge
from mpilm.comm import order, p2p
from mpilm.comm.devices import HOST, Array, Device
from mpilm.sync.compress._parcels import Parcel, Quicker

if TYPE_CHECKING:
    from mpilm.sync.compress._base import Codec

UNDER_WAY = 3


class Exchange:
    """Sums buffers of `count` float32 values over `comm`, with this rank's residuals.

    Args:
        comm: Used by nobody else while a sum is under way. Every method is collective over it.
        device: Whose buffers are summed. Its codes travel through pinned memory of the host.
        small: Whether codes travel in zstd; None: where that is quicker.
    """

    def __init__(self, codec: Codec, comm: MPI.Comm, count: int, device: Device = HOST, *,
                 small: bool | None = None) -> None:
        self.codec, self.comm = codec, comm
        self.small, self.quicker, self.last = small, Quicker(), (False, math.inf)
        self.cut = order.segments(count, comm.size)
        self.mine = self.cut[comm.rank]
        self.pieces = list(order.pieces(self.cut, device.grain * codec.PIECE))
        self.steps = order.tree(comm.size)
        self.lost = torch.zeros(count, device=device.torch)
        self.lost_in_sum = torch.zeros_like(self.lost[self.mine])
        longest = max((piece.stop - piece.start for pieces in self.pieces[:1] for piece in pieces), default=0)
        self._parts = [torch.empty(longest, device=device.torch) for _ in self.cut]
        self._turns = [_Turn(codec.size(longest), comm, device) for _ in self.pieces[:UNDER_WAY]]

    def reduce(self, buffer: Array) -> None:
        """Replace `buffer` by the sum over all ranks, as far as the code can tell it; the same bits on every rank."""
        started, small = time.perf_counter(), self.quicker.next() if self.small is None else self.small
        values, number = bridge.tensor(buffer, torch.float32), len(self.pieces)
        for turn in range(number + 2):
            if turn < number:
                self._send(values, turn, small=small)
            if 1 <= turn <= number:
                self._sum(values, turn - 1, small=small)
            if turn >= 2:
                self._take(values, turn - 2)
        for place in self._turns:
            place.ledger.wait()
        if not torch.isfinite(values.sum()):
            self._forget()
        self.last = small, time.perf_counter() - started

    def _send(self, values: torch.Tensor, number: int, *, small: bool) -> None:
        """Encode a piece of every segment for its owner."""
        turn, pieces = self._turns[number % UNDER_WAY], self.pieces[number]
        turn.begin()
        for rank in (*turn.others, self.comm.rank):
            piece, parcel = pieces[rank], turn.values_out[rank]
            self.codec.squeeze(values[piece], self.lost[piece], parcel.codes[:self._size(piece)])
            if rank != self.comm.rank:
                parcel.seconds[0] = self.last[1]
                turn.send(parcel.pack(self._size(piece), small=small), [rank], p2p.TAG_CODES)

    def _sum(self, values: torch.Tensor, number: int, *, small: bool) -> None:
        """Add up everyone's values of a piece of mine, encode the sum for everyone, and use what they decode."""
        turn, piece = self._turns[number % UNDER_WAY], self.pieces[number][self.comm.rank]
        length, size = piece.stop - piece.start, self._size(piece)
        parts = [part[:length] for part in self._parts]
        parts[self.comm.rank] = values[piece]
        turn.ledger.wait_for(turn.values)
        for rank in turn.others:
            turn.values_in[rank].unpack(size)
            self.codec.decode(turn.values_in[rank].codes[:size], parts[rank])
        for into, other in self.steps:
            parts[into].add_(parts[other])
        lost = self.lost_in_sum[piece.start - self.mine.start:piece.stop - self.mine.start]
        self.codec.squeeze(parts[0], lost, turn.sum_out.codes[:size])
        values[piece] = parts[0]
        turn.send(turn.sum_out.pack(size, small=small), turn.others, p2p.TAG_CODED_SUMS)
        if number == 0:     # how long the last sum took everyone
            self.quicker.note(self.last[0], max([self.last[1], *turn.seconds()]))

    def _take(self, values: torch.Tensor, number: int) -> None:
        """Decode the sums of a piece of everyone else's segment."""
        turn = self._turns[number % UNDER_WAY]
        turn.ledger.wait_for(turn.sums)
        for rank in turn.others:
            piece = self.pieces[number][rank]
            size = self._size(piece)
            turn.sums_in[rank].unpack(size)
            self.codec.decode(turn.sums_in[rank].codes[:size], values[piece])

    def _size(self, piece: slice) -> int:
        return self.codec.size(piece.stop - piece.start)

    def _forget(self) -> None:
        """Drop residuals that come from gradients that were not finite, or every step to come would be skipped too.

        All ranks see the same sum, so all do it together."""
        self.lost.zero_()
        self.lost_in_sum.zero_()


class _Turn:
    """Room for a piece of every segment, on its way to its owner and back.

    Attributes:
        others: The ranks but mine, those after it first.
        values_out: Rank -> parcel of values; that of mine does not travel.
        values_in, sums_in: Rank -> parcel of what it sends; of all others.
        sum_out: For all others.
        values, sums: What is being received, by the ledger.
    """

    def __init__(self, size: int, comm: MPI.Comm, device: Device) -> None:
        self.comm, self.ledger = comm, p2p.Ledger()
        self.others = [(comm.rank + step) % comm.size for step in range(1, comm.size)]
        self.values_out = {rank: Parcel(size, device) for rank in range(comm.size)}
        self.values_in, self.sums_in = ({rank: Parcel(size, device) for rank in self.others} for _ in range(2))
        self.sum_out = Parcel(size, device)
        self.values: list[Any] = []
        self.sums: list[Any] = []

    def begin(self) -> None:
        """Once everything of the last time is through, receive what is to come."""
        self.ledger.wait()
        self.values = self._receive(self.values_in, p2p.TAG_CODES)
        self.sums = self._receive(self.sums_in, p2p.TAG_CODED_SUMS)

    def _receive(self, parcels: dict[int, Parcel], tag: int) -> list[Any]:
        return [self.ledger.receive(self.comm, parcel.room, source=rank, tag=tag) for rank, parcel in parcels.items()]

    def send(self, packed: Array, ranks: Sequence[int], tag: int) -> None:
        """The same to all of them."""
        for rank in ranks:
            self.ledger.send(self.comm, packed, dest=rank, tag=tag)

    def seconds(self) -> list[float]:
        """What came with everyone's values."""
        return [float(parcel.seconds[0]) for parcel in self.values_in.values()]
