"""Whether looking for a message moves it: by the time that looks take, for MPI does not tell.

Where the kernel may not copy from rank to rank (containers, other users' processes), and where sockets are read, MPI
moves a message in calls of whoever waits for it, some pages in each. Who sleeps between two such calls slows it down by
orders of magnitude; who does not sleep while nothing comes takes the time of whoever computes. A call that moves some
pages takes ten times as long as one that finds nothing.

Time is this thread's own, so other threads do not enter it. A single look tells little: what was interrupted, or begins
with cold caches after a nap, is slow too. So it is the median of WINDOW looks, without the first after a nap.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
WINDOW = 9
MOVED_S = 2e-6  # so much longer than the quickest look


class Motion:
    """The looks of one wait.

    Args:
        clock: Seconds of this thread.

    Attributes:
        seen: Whether the last looks moved something.
    """

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.clock = clock
        self.seen = False
        self._quickest = math.inf
        self._last: deque[float] = deque(maxlen=WINDOW)

    def look(self, ready: Callable[[], T | None]) -> T | None:
        """ready(); after a nap as often in a row as it takes to know whether anything moves."""
        cold = not self._last
        while (found := self._timed(ready)) is None and len(self._last) < WINDOW:
            if cold:
                self._last.clear()
                cold = False
        self.seen = len(self._last) == WINDOW and statistics.median(self._last) > self._quickest + MOVED_S
        return found

    def napped(self) -> None:
        """What comes next is another window."""
        self._last.clear()

    def _timed(self, ready: Callable[[], T | None]) -> T | None:
        began = self.clock()
        found = ready()
        taken = self.clock() - began
        self._quickest = min(self._quickest, taken)
        self._last.append(taken)
        return found
