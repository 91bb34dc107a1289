"""The way out of a rank, and an emulated slow one: for tests and benchmarks only.

    MPILM_NETWORK=100:1     every rank sends 100 Mbit/s at most, and what it sends arrives 1 ms later
    with emulated(Line(mbit_s=100, latency_ms=1)): ...      the same in a program that is running

A rank has one line out. Its messages (p2p.Ledger) take it one after the other, each for bytes / bandwidth, and are
handed to MPI a latency after that, by whoever waits (p2p.until) or sends. Ways in are not limited. Of what MPI sends by
itself, sums of `--sync.collective mpi` take their time too; the few bytes by which ranks agree take none. Memory that
ranks share is no network: have each rank be a node (MPILM_RANKS_PER_NODE=1), or sums be a ring's.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpilm.log import UserError

VARIABLE = "MPILM_NETWORK"
Clock = Callable[[], float]


class Line:
    """The way out.

    Args:
        mbit_s: Bandwidth, 10^6 bits a second; infinite where nothing is emulated.
        latency_ms: Of each message, after it has left.
        clock: Seconds.
    """

    def __init__(self, mbit_s: float = float("inf"), latency_ms: float = 0.0, *,
                 clock: Clock = time.perf_counter) -> None:
        self.mbit_s, self.latency_ms, self.clock = mbit_s, latency_ms, clock
        self._free = 0.0    # when everything has left
        self._under_way: deque[tuple[float, Callable[[], None]]] = deque()
        self._lock = threading.Lock()

    def seconds(self, nbytes: int) -> float:
        """That so many bytes take to leave."""
        return nbytes * 8e-6 / self.mbit_s

    def carry(self, nbytes: int, deliver: Callable[[], None]) -> None:
        """Have `deliver` called when a message of so many bytes has arrived: at once if that takes no time."""
        if not (self.seconds(nbytes) or self.latency_ms):
            deliver()
            return
        with self._lock:
            self._free = max(self.clock(), self._free) + self.seconds(nbytes)
            self._under_way.append((self._free + self.latency_ms / 1e3, deliver))
        self.hand_over()

    def spend(self, nbytes: int) -> None:
        """Wait for as long as so many bytes would take, if that is any time."""
        if seconds := self.seconds(nbytes):
            time.sleep(seconds + self.latency_ms / 1e3)

    def drop(self) -> None:
        """Lose what is under way: it belongs to a world that has ended, for those who wait for it too."""
        with self._lock:
            self._under_way.clear()
            self._free = 0.0

    def hand_over(self) -> None:
        """Deliver what has arrived by now, in the order in which it left."""
        if not self._under_way:
            return
        with self._lock:
            while self._under_way and self._under_way[0][0] <= self.clock():
                self._under_way.popleft()[1]()


_current: list[Line] = []   # the last one counts


def line() -> Line:
    """This process's.

    Raises:
        UserError: MPILM_NETWORK is not what it should be.
    """
    if not _current:
        _current.append(from_text(os.environ.get(VARIABLE, "")))
    return _current[-1]


def from_text(text: str) -> Line:
    """What MPILM_NETWORK says; nothing: a line that takes no time.

    Raises:
        UserError: It is neither empty nor two numbers.
    """
    if not text:
        return Line()
    try:
        mbit_s, latency_ms = map(float, text.split(":"))
    except ValueError:
        mbit_s = latency_ms = -1.0
    if not (mbit_s > 0 and 0 <= latency_ms < float("inf")):
        raise UserError(f"{VARIABLE}={text}: give Mbit/s and milliseconds, such as 100:1.")
    return Line(mbit_s, latency_ms)


@contextmanager
def emulated(slow: Line) -> Iterator[None]:
    """All messages of this block go by `slow`; none may be under way at its beginning or its end."""
    _current.append(slow)
    try:
        yield
    finally:
        _current.pop()
