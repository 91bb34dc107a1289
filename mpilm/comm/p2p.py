"""Waiting, and the ledger of messages in flight. Every wait of comm/ is in this file, in `until`.

A wait polls: it spins for a moment, because most answers are microseconds away, then sleeps in growing naps, because
ranks often share their core with computing threads (their own, while the communication thread waits for a slower
rank). A blocking MPI call would spin there all the time. What looking moves is not slept over
(motion.py).

    ledger = Ledger()
    ledger.send(comm, array, dest=1, tag=TAG_RING)      # the array is kept alive until wait() has returned
    ledger.wait()
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mpi4py import MPI

from mpilm.comm import network
from mpilm.comm.motion import Motion

T = TypeVar("T")
SPIN_S = 500e-6  # longer than any message of comm/ takes once both sides are there
NAP_S = 20e-6
LONGEST_NAP_S = 500e-6
LONG_BYTES = 2**17  # a message that MPI may move part by part
LOOKS = 3  # that find nothing, before there is nothing

# Tags of comm/: one place, so that no two kinds of message can be taken for each other.
TAG_RING = 101
TAG_TREE = 102
TAG_ACROSS = 103
TAG_KEYS = 104  # of ring attention, and their gradients
TAG_SUMS = 105
TAG_PUSH = 106  # gradients, to servers
TAG_PULL = 107  # parameters, from servers, and what is told with them
TAG_TRIED = 108  # of a device: whether it arrives
TAG_CODES = 109  # of gradients that are compressed, to whoever sums them
TAG_CODED_SUMS = 110
TAG_STAGES = 1024  # and above: two for every cut between pipeline stages


def nothing() -> None:
    """There is nothing to do."""


def wait(requests: Sequence[MPI.Request], *, nbytes: int = 0) -> None:
    """Return when all `requests` are complete; the longest message has `nbytes`, if that is known."""
    pending = list(requests)
    if nbytes < LONG_BYTES:
        until(lambda: MPI.Request.Testall(pending) or None)
    elif not MPI.Request.Testall(pending):
        motion = Motion()
        until(lambda: motion.look(lambda: MPI.Request.Testall(pending) or None), motion=motion)


def until(ready: Callable[[], T | None], *, longest_s: float = LONGEST_NAP_S, motion: Motion | None = None) -> T:
    """What `ready` returns, once it is not None. Whoever waits also keeps the line moving.

    Args:
        longest_s: Between two looks.
        motion: Of what is waited for: nobody naps while something moves.
    """
    if (found := ready()) is not None:
        return found
    nap, spin_until, line = NAP_S, time.perf_counter() + SPIN_S, network.line()
    while (found := ready()) is None:
        line.hand_over()
        if motion is not None and motion.seen:
            nap, spin_until = NAP_S, time.perf_counter() + SPIN_S
        if time.perf_counter() < spin_until:
            os.sched_yield()  # gives way to whoever shares the core
        else:
            time.sleep(nap)
            nap = min(2 * nap, longest_s)
            if motion is not None:
                motion.napped()
    return found


def barrier(comm: MPI.Comm, *, longest_s: float = LONGEST_NAP_S) -> None:
    """All ranks of `comm` have arrived; whoever waits looks that often, seconds. Collective over `comm`."""
    arrived = comm.Ibarrier()
    until(lambda: arrived.Test() or None, longest_s=longest_s)


def has_come(comm: MPI.Comm, *, tag: int = MPI.ANY_TAG, status: MPI.Status | None = None) -> bool:
    """Whether there is a message to receive, of anyone.

    MPICH finds what it had taken in before it was asked, and takes in the next message while it is asked: whoever looks
    once is told of one message a look, and falls behind.
    """
    return any(comm.Iprobe(source=MPI.ANY_SOURCE, tag=tag, status=status) for _ in range(LOOKS))


class Traffic:
    """Bytes that this rank has handed to MPI for other ranks so far, whoever sent them."""

    sent = 0


@dataclass
class _Message:
    """Attributes:
    request: None before MPI has been given it (network.py), which another thread may do.
    """

    array: Any
    request: MPI.Request | None = None


class Ledger:
    """Messages in flight, each with the array that it reads or writes.

    Args:
        synchronous: Every send is through only when it is being received, as under an MPI that buffers nothing: for
            tests, which would pass by luck where small messages are buffered.
        settle: Called before MPI is given an array: what is to be done with it so far has been done on return.
    """

    def __init__(self, *, synchronous: bool = False, settle: Callable[[], None] = nothing) -> None:
        self.synchronous, self.settle = synchronous, settle
        self._entries: list[_Message] = []

    def send(self, comm: MPI.Comm, array: Any, *, dest: int, tag: int) -> None:
        """Start to send a contiguous array; it must not change before wait()."""
        self.settle()
        start, message = comm.Issend if self.synchronous else comm.Isend, _Message(array)

        def deliver() -> None:
            message.request = start(array, dest=dest, tag=tag)

        Traffic.sent += array.nbytes
        self._entries.append(message)
        network.line().carry(array.nbytes, deliver)

    def receive(self, comm: MPI.Comm, array: Any, *, source: int, tag: int) -> Any:
        """Start to receive into a contiguous array; it must not be read before wait(), or wait_for() what this gives,
        which is MPI's request or has the same Test()."""
        self.settle()
        request = comm.Irecv(array, source=source, tag=tag)
        self._entries.append(_Message(array, request))
        return request

    def reap(self) -> None:
        """Let go of the arrays of messages that are through."""
        self._entries = [entry for entry in self._entries if entry.request is None or not entry.request.Test()]

    def wait_for(self, expected: Sequence[Any]) -> None:
        """Return when these messages, which `receive` has given, are there."""
        wait(expected, nbytes=self._longest())

    def wait(self) -> None:
        """Return when every message is through."""
        until(lambda: all(entry.request is not None for entry in self._entries) or None)
        wait([entry.request for entry in self._entries if entry.request is not None], nbytes=self._longest())
        self._entries.clear()

    def _longest(self) -> int:
        return max((entry.array.nbytes for entry in self._entries), default=0)
