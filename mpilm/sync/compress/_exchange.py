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

from mpilm.comm import order
from mpilm.sync.compress._parcels import Parcel, Quicker, swap

if TYPE_CHECKING:
    from mpilm.sync.compress._base import Codec


class Exchange:
    """Sums buffers of `count` float32 values over `comm`, with this rank's residuals.

    Args:
        comm: Used by nobody else while a sum is under way. Every method is collective over it.
        small: Whether codes travel in zstd; None: where that is quicker.
    """

    def __init__(self, codec: Codec, comm: MPI.Comm, count: int, *, small: bool | None = None) -> None:
        self.codec, self.comm = codec, comm
        self.small, self.quicker, self.last = small, Quicker(), (False, math.inf)
        self.cut = order.segments(count, comm.size)
        self.mine = self.cut[comm.rank]
        self.steps = order.tree(comm.size)
        self.lost = torch.zeros(count)
        self.lost_in_sum = torch.zeros(self.mine.stop - self.mine.start)
        self._out = [self._room(piece) for piece in self.cut]
        self._in = [self._room(self.mine) for _ in self.cut]
        self._parts = [torch.empty_like(self.lost_in_sum) for _ in self.cut]

    def _room(self, piece: slice) -> Parcel:
        return Parcel(self.codec.size(piece.stop - piece.start))

    def reduce(self, buffer: np.ndarray) -> None:
        """Replace `buffer` by the sum over all ranks, as far as the code can tell it; the same bits on every rank."""
        started, small = time.perf_counter(), self.quicker.next() if self.small is None else self.small
        self._reduce(torch.from_numpy(buffer), small=small)
        self.last = small, time.perf_counter() - started

    def _reduce(self, values: torch.Tensor, *, small: bool) -> None:
        for piece, parcel in zip(self.cut, self._out, strict=True):
            self.codec.squeeze(values[piece], self.lost[piece], parcel.data)
            parcel.seconds[0] = self.last[1]
        swap(self.comm, self._out, self._in, small=small)
        self.quicker.note(self.last[0], max(float(parcel.seconds[0]) for parcel in self._in))
        for part, parcel in zip(self._parts, self._in, strict=True):
            self.codec.decode(parcel.data, part)
        for into, other in self.steps:
            self._parts[into].add_(self._parts[other])
        total = self._out[self.comm.rank]
        self.codec.squeeze(self._parts[0], self.lost_in_sum, total.data)
        swap(self.comm, [total] * self.comm.size, self._out, small=small)
        for piece, parcel in zip(self.cut, self._out, strict=True):
            self.codec.decode(parcel.data, values[piece])
        if not torch.isfinite(values.sum()):
            self._forget()

    def _forget(self) -> None:
        """Drop residuals that come from gradients that were not finite, or every step to come would be skipped too.

        All ranks see the same sum, so all do it together."""
        self.lost.zero_()
        self.lost_in_sum.zero_()
