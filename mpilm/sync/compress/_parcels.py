"""Codes on their way: in zstd where the line is so slow that it pays.

    parcel   | length of a zstd frame, or 0 | seconds that the sender's last sum took | codes, or the frame |

Most levels of a code are small and many of its blocks are empty, so zstd takes a third or more off without losing
anything. It makes some hundreds of MB/s, which a slow line is far below and a node's memory far above. So sums are made
both ways in turns and then the quicker way, with the other one tried again now and then (`Quicker`). How long each took
the slowest rank travels with the next one, so that all ranks choose the same.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import zstandard

from mpilm.comm.devices import HOST, Device

HEAD = 16           # bytes, so that codes begin where any of their numbers may
LEVEL = 1           # of zstd: half a GB/s, and level 3 saves a twentieth more


class Parcel:
    """Room for codes of up to `size` bytes, and for what they travel with.

    Args:
        device: Where codes are made. They travel through pinned memory of the host.

    Attributes:
        room: What is received into.
        codes: uint8, where codes are made and read.
        seconds: One float64 that travels with them.
    """

    def __init__(self, size: int, device: Device = HOST) -> None:
        self._device = device
        self.room = device.pinned(HEAD + size, np.uint8)
        self.room.fill(0)
        self._length, self.seconds = self.room[:8].view(np.int64), self.room[8:HEAD].view(np.float64)
        self._data = self.room[HEAD:]
        self.codes = self._data if device.shares else device.empty(size, np.uint8)

    def pack(self, size: int, *, small: bool) -> np.ndarray:
        """What is to be sent of the first `size` bytes of codes: in zstd where that is asked for and is shorter."""
        data = self._data[:size]
        if not self._device.shares:
            self._device.to_host(self.codes[:size], data)
            self._device.settle()
        self._length[0] = 0
        if small:
            frame = zstandard.ZstdCompressor(level=LEVEL).compress(data.data)
            if len(frame) < size:
                self._length[0] = len(frame)
                return np.frombuffer(self.room[:HEAD].tobytes() + frame, np.uint8)
        return self.room[:HEAD + size]

    def unpack(self, size: int) -> None:
        """Make what was received into `room` the first `size` bytes of codes."""
        data = self._data[:size]
        if length := int(self._length[0]):
            data[:] = np.frombuffer(zstandard.ZstdDecompressor().decompress(self._data[:length].data), np.uint8)
        if not self._device.shares:
            self._device.to_device(data, self.codes[:size])
            self._device.settle()   # the next message comes to the same memory


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
