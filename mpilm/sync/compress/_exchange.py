"""A sum of compressed values over ranks: what `collective.reduce` does, with fewer bytes.

    each rank     values + residual --code--> one message for every rank: that rank's segment
    the owner     decodes everyone's, adds them in float32 in tree order
                  sum + residual --code--> one message to all
    each rank     decodes the sums of all segments

So every value is rounded twice, once by its rank and once, as a sum, by the owner of its segment; nothing is rounded
while it travels, whatever the number of ranks. Both residuals are fed back, so what one step loses the next ones send
(as in 1-bit Adam's compressed allreduce, arXiv 2102.02888, which has no order of its own). A rank sends
2 (size - 1) / size of the encoded buffer, or less (`_parcels.py`). The owner too uses what it decodes, so all ranks end
with the same bits.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from mpi4py import MPI

from mpilm import bridge
from mpilm.comm import order
from mpilm.comm.devices import HOST, Array, Device
from mpilm.sync.compress._parcels import Parcel, Quicker, swap

if TYPE_CHECKING:
    from mpilm.sync.compress._base import Codec


class Exchange:
    """Sums buffers of `count` float32 values over `comm`, with this rank's residuals.

    Args:
        comm: Used by nobody else while a sum is under way. Every method is collective over it.
        device: Whose buffers are summed. Its codes travel through pinned memory of the host.
        small: Whether codes travel in zstd; None: where that is quicker.
    """

    def __init__(self, codec: Codec, comm: MPI.Comm, count: int, device: Device = HOST, *,
                 small: bool | None = None) -> None:
        self.codec, self.comm, self.device = codec, comm, device
        self.small, self.quicker, self.last = small, Quicker(), (False, math.inf)
        self.cut = order.segments(count, comm.size)
        self.mine = self.cut[comm.rank]
        self.steps = order.tree(comm.size)
        self.lost = torch.zeros(count, device=device.torch)
        self.lost_in_sum = torch.zeros_like(self.lost[self.mine])
        self._out = [self._room(piece) for piece in self.cut]
        self._in = [self._room(self.mine) for _ in self.cut]
        self._codes_out, self._codes_in = self._codes(self._out), self._codes(self._in)
        self._parts = [torch.empty_like(self.lost_in_sum) for _ in self.cut]

    def _room(self, piece: slice) -> Parcel:
        return Parcel(self.codec.size(piece.stop - piece.start), self.device.pinned)

    def _codes(self, parcels: list[Parcel]) -> list[Array]:
        """Where the codes of parcels are made: in them, or on the device."""
        return [parcel.data if self.device.shares else self.device.zeros(parcel.data.size, np.uint8)
                for parcel in parcels]

    def reduce(self, buffer: Array) -> None:
        """Replace `buffer` by the sum over all ranks, as far as the code can tell it; the same bits on every rank."""
        started, small = time.perf_counter(), self.quicker.next() if self.small is None else self.small
        self._reduce(bridge.tensor(buffer, torch.float32), small=small)
        self.last = small, time.perf_counter() - started

    def _reduce(self, values: torch.Tensor, *, small: bool) -> None:
        for piece, parcel, codes in zip(self.cut, self._out, self._codes_out, strict=True):
            self.codec.squeeze(values[piece], self.lost[piece], codes)
            parcel.seconds[0] = self.last[1]
        self._swap(self._out, self._codes_out, self._in, self._codes_in, small=small)
        self.quicker.note(self.last[0], max(float(parcel.seconds[0]) for parcel in self._in))
        for part, codes in zip(self._parts, self._codes_in, strict=True):
            self.codec.decode(codes, part)
        for into, other in self.steps:
            self._parts[into].add_(self._parts[other])
        rank, size = self.comm.rank, self.comm.size
        self.codec.squeeze(self._parts[0], self.lost_in_sum, self._codes_out[rank])
        self._swap([self._out[rank]] * size, [self._codes_out[rank]] * size, self._out, self._codes_out, small=small)
        for piece, codes in zip(self.cut, self._codes_out, strict=True):
            self.codec.decode(codes, values[piece])
        if not torch.isfinite(values.sum()):
            self._forget()

    def _swap(self, outgoing: list[Parcel], made: list[Array], incoming: list[Parcel], wanted: list[Array], *,
              small: bool) -> None:
        """As `swap`, from and to where codes are made."""
        if self.device.shares:
            swap(self.comm, outgoing, incoming, small=small)
            return
        pairs = {id(parcel): (parcel, codes) for parcel, codes in zip(outgoing, made, strict=True)}
        for parcel, codes in pairs.values():    # everyone may get the same
            self.device.to_host(codes, parcel.data)
        self.device.settle()
        swap(self.comm, outgoing, incoming, small=small)
        for parcel, codes in zip(incoming, wanted, strict=True):
            self.device.to_device(parcel.data, codes)
        self.device.settle()    # the next sum writes the same memory

    def _forget(self) -> None:
        """Drop residuals that come from gradients that were not finite, or every step to come would be skipped too.

        All ranks see the same sum, so all do it together."""
        self.lost.zero_()
        self.lost_in_sum.zero_()
