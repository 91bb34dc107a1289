"""Codes on their way: in zstd where the line is so slow that it pays.

    parcel   | length of a zstd frame, or 0 | seconds that the sender's last sum took | codes, or the frame |

Most levels of a code are small and many of its blocks are empty, so zstd takes a third or more off without losing
anything. It makes some hundreds of MB/s, which a slow line is far below and a node's memory far above. So sums are made
both ways in turns and then the quicker way, with the other one tried again now and then (`Quicker`). How long each took
the slowest rank travels with the next one, so that all ranks choose the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import zstandard
from mpi4py import MPI

from mpilm.comm import arrays, p2p

TAG = 201
HEAD = 16           # bytes, so that codes begin where any of their numbers may
LEVEL = 1           # of zstd: half a GB/s, and level 3 saves a twentieth more


class Parcel:
    """Room for codes of `size` bytes, `data`, and for what they travel with: the `seconds`.

    Args:
        memory: Makes host memory of (bytes, dtype).
    """

    def __init__(self, size: int, memory: Callable[[int, npt.DTypeLike], np.ndarray] = np.zeros) -> None:
        self.room = memory(HEAD + size, np.uint8)
        self.room.fill(0)
        self.length, self.seconds = self.room[:8].view(np.int64), self.room[8:HEAD].view(np.float64)
        self.data = self.room[HEAD:]

    def pack(self, *, small: bool) -> np.ndarray:
        """What is to be sent of `data`: in zstd where that is asked for and is shorter."""
        self.length[0] = 0
        if not small or self.room.size > arrays.MESSAGE_BYTES:  # sent in several messages, and both ends count them
            return self.room
        frame = zstandard.ZstdCompressor(level=LEVEL).compress(self.data.data)
        if len(frame) >= self.data.size:
            return self.room
        self.length[0] = len(frame)
        return np.frombuffer(self.room[:HEAD].tobytes() + frame, np.uint8)

    def unpack(self) -> None:
        """Bring what was received into `room` to `data`."""
        if length := int(self.length[0]):
            self.data[:] = np.frombuffer(zstandard.ZstdDecompressor().decompress(self.data[:length].data), np.uint8)


def swap(comm: MPI.Comm, outgoing: list[Parcel], incoming: list[Parcel], *, small: bool) -> None:
    """Parcel number r of `outgoing` goes to rank r, and what r sent to me into `incoming`[r]. Collective over `comm`.
    """
    rank, ledger = comm.rank, p2p.Ledger()
    others = [(rank + step) % comm.size for step in range(1, comm.size)]
    for other in reversed(others):
        for part in arrays.messages(incoming[other].room):
            ledger.receive(comm, part, source=other, tag=TAG)
    packed: dict[int, np.ndarray] = {}
    for other in others:
        parcel = outgoing[other]
        if id(parcel) not in packed:    # everyone may get the same
            packed[id(parcel)] = parcel.pack(small=small)
        for part in arrays.messages(packed[id(parcel)]):
            ledger.send(comm, part, dest=other, tag=TAG)
    incoming[rank].room[:] = outgoing[rank].room
    ledger.wait()
    for other in others:
        incoming[other].unpack()


class Quicker:
    """Which of two ways takes less time, where that may change: the better of the last two times of each counts."""

    AGAIN = 32  # times, until the slower way is tried once more

    def __init__(self) -> None:
        self.seconds: dict[bool, deque[float]] = {way: deque(maxlen=2) for way in (False, True)}
        self.turn = 0

    def next(self) -> bool:
        """The way to go now."""
        self.turn += 1
        least, most = sorted(self.seconds, key=lambda way: len(self.seconds[way]))
        if len(self.seconds[least]) < 2:
            return least
        quicker = min((least, most), key=lambda way: min(self.seconds[way]))
        return not quicker if self.turn % self.AGAIN == 0 else quicker

    def note(self, way: bool, seconds: float) -> None:
        """It took so long."""
        self.seconds[way].append(seconds)
