"""Messages of a device's memory through the host's, for an MPI that knows nothing of the device.

A message goes in pieces, and each pair of ranks has two pieces under way in each direction:

    sender      copy 0 to the host | copy 1      | copy 2       ...
                                   | send 0      | send 1       ...
    receiver                         receive 0   | receive 1    ...
                                                 | copy 0 to the device | copy 1 ...

Copies out, copies in, and the sums that follow have a stream each, so they overlap with each other and with messages.
Whoever waits for anything in a thread moves everything on that this thread has under way.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
from mpi4py import MPI

from mpilm.comm import arrays, network, p2p
from mpilm.comm.devices import Array, Device
from mpilm.comm.devices._base import IN, OUT

PIECE_BYTES = 256 * 2**10   # times a device's grain: 4 MiB on a GPU, 80 microseconds of PCIe
WINDOW = 2


class Pool:
    """Pinned memory, kept for the next message, and the channels of every thread that have something under way."""

    def __init__(self, device: Device, piece_bytes: int = 0) -> None:
        self.device = device
        self.piece_bytes = piece_bytes or device.grain * PIECE_BYTES
        self._spare: list[np.ndarray] = []
        self._local = threading.local()

    def take(self) -> np.ndarray:
        """`piece_bytes` of pinned memory."""
        try:
            return self._spare.pop()
        except IndexError:
            return self.device.pinned(self.piece_bytes, np.uint8)

    def give(self, memory: np.ndarray) -> None:
        """Nothing reads or writes it any more."""
        self._spare.append(memory)

    @property
    def _channels(self) -> dict[tuple[Any, ...], _Channel]:
        """Of this thread. A channel is of one rank, tag and direction, whichever ledger a message is in: MPI takes
        messages in the order in which both sides name them."""
        if not hasattr(self._local, "channels"):
            self._local.channels = {}
        channels: dict[tuple[Any, ...], _Channel] = self._local.channels
        return channels

    def post(self, pieces: Sequence[_Going] | Sequence[_Coming]) -> None:
        """Start with a message, and move everything on."""
        for piece in pieces:
            key = type(piece), id(piece.comm), piece.peer, piece.tag
            self._channels.setdefault(key, _Channel()).pieces.append(piece)
        self.advance()

    def advance(self) -> None:
        """Move on whatever of this thread can be moved without waiting."""
        channels = self._channels
        for key in list(channels):
            channels[key].advance()
            if not channels[key].pieces:
                del channels[key]


class _Piece:
    """A part of a message, and its place in pinned memory.

    Attributes:
        passed: What comes after it in its channel may be handed on too.
        through: It needs its place no more.
    """

    def __init__(self, pool: Pool, comm: MPI.Comm, array: Array, ready: Any, peer: int, tag: int) -> None:
        self.pool, self.comm, self.array, self.ready, self.peer, self.tag = pool, comm, array, ready, peer, tag
        self.memory: np.ndarray | None = None
        self.copied: Any = None
        self.request: MPI.Request | None = None
        self.passed = self.through = False

    def view(self) -> np.ndarray:
        """Of pinned memory, what it needs."""
        if self.memory is None:
            self.memory = self.pool.take()
        return self.memory[:self.array.nbytes].view(self.array.dtype)

    def free(self) -> None:
        """The memory is of no use any more."""
        assert self.memory is not None
        self.pool.give(self.memory)
        self.through = True


class _Going(_Piece):
    """Copied, then sent."""

    synchronous = False

    def begin(self) -> None:
        """Queue the copy, if that was not done."""
        if self.memory is None:
            device = self.pool.device
            with device.stream(OUT):
                device.follow(self.ready)
                device.to_host(self.array, self.view())
                self.copied = device.record()

    def advance(self) -> bool:
        """Whether it is through."""
        if not self.passed and self.pool.device.happened(self.copied):
            self.passed = True
            network.line().carry(self.array.nbytes, self._deliver)
        return self.request is not None and self.request.Test()

    def _deliver(self) -> None:
        start = self.comm.Issend if self.synchronous else self.comm.Isend
        self.request = start(self.view(), dest=self.peer, tag=self.tag)


class _Coming(_Piece):
    """Received, then copied."""

    def begin(self) -> None:
        """Be ready for it, if that was not done."""
        if self.request is None:
            self.request = self.comm.Irecv(self.view(), source=self.peer, tag=self.tag)

    def advance(self) -> bool:
        """Whether it is in its place."""
        device = self.pool.device
        if not self.passed and self.request is not None and self.request.Test():
            with device.stream(IN):
                device.follow(self.ready)
                device.to_device(self.view(), self.array)
                self.copied = device.record()
            self.passed = True
        return self.passed and device.happened(self.copied)


class _Channel:
    """Pieces from or to one rank under one tag, the first WINDOW of them under way; none overtakes another."""

    def __init__(self) -> None:
        self.pieces: deque[_Going | _Coming] = deque()

    def advance(self) -> None:
        """Move on what can be moved without waiting."""
        for piece in islice(self.pieces, WINDOW):
            piece.begin()
        while self.pieces and self.pieces[0].advance():
            self.pieces.popleft().free()
            if len(self.pieces) >= WINDOW:
                self.pieces[WINDOW - 1].begin()
        if len(self.pieces) > 1 and self.pieces[0].passed:
            self.pieces[1].advance()


class Expected:
    """A message that comes in, as `receive` gives it."""

    def __init__(self, pool: Pool, pieces: Sequence[_Coming]) -> None:
        self.pool, self.pieces = pool, pieces

    @property
    def queued(self) -> bool:
        """Every piece has been received, and its copy is queued."""
        return all(piece.passed for piece in self.pieces)

    def Test(self) -> bool:  # noqa: N802 - MPI's name
        """Whether it is there, or will be for what follows it; never waits."""
        self.pool.advance()
        return self.queued

    def follow(self) -> None:
        """What the current stream does from now on finds it in its place."""
        if self.pieces:     # copies happen in order
            self.pool.device.follow(self.pieces[-1].copied)


class StagedLedger(p2p.Ledger):
    """Messages in flight, as p2p.Ledger; arrays belong to the current stream of the thread that uses it."""

    def __init__(self, pool: Pool, *, synchronous: bool = False) -> None:
        super().__init__(synchronous=synchronous)
        self.pool = pool
        self._going: list[_Going] = []
        self._expected: list[Expected] = []

    def send(self, comm: MPI.Comm, array: Array, *, dest: int, tag: int) -> None:
        """As Ledger."""
        p2p.Traffic.sent += array.nbytes
        ready = self.pool.device.record()
        pieces = [_Going(self.pool, comm, part, ready, dest, tag) for part in self._cut(array)]
        for piece in pieces:
            piece.synchronous = self.synchronous
        self._going += pieces
        self.pool.post(pieces)

    def receive(self, comm: MPI.Comm, array: Array, *, source: int, tag: int) -> Expected:
        """As Ledger."""
        ready = self.pool.device.record()   # what reads or writes the array now must be through
        pieces = [_Coming(self.pool, comm, part, ready, source, tag) for part in self._cut(array)]
        self._expected.append(Expected(self.pool, pieces))
        self.pool.post(pieces)
        return self._expected[-1]

    def _cut(self, array: Array) -> list[Array]:
        """Both ends cut a message alike; an empty one is a message too."""
        length = self.pool.piece_bytes // array.itemsize
        return [array[part] for part in arrays.chunks(0, len(array), length)] or [array]

    def reap(self) -> None:
        """As Ledger."""
        self.pool.advance()
        self._going = [piece for piece in self._going if not piece.through]

    def wait_for(self, expected: Sequence[Expected]) -> None:
        """As Ledger; what the current stream does then finds the messages in their places."""
        p2p.until(lambda: all(message.Test() for message in expected) or None)
        for message in expected:
            message.follow()
            self._expected.remove(message)

    def wait(self) -> None:
        """As Ledger; likewise."""
        def through() -> bool | None:
            self.pool.advance()
            return (all(piece.through for piece in self._going)
                    and all(message.queued for message in self._expected)) or None

        p2p.until(through)
        for message in self._expected:
            message.follow()
        self._going, self._expected = [], []
