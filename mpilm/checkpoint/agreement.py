"""How ranks agree about work that threads do, while MPI is called from one thread only.

`Rounds` answers "has every rank finished?", or any question whose answer is the smallest of all votes, without waiting
for anybody: asked in one step, answered in the next, by when all ranks have asked. Every rank gets the same answer at
the same call, so all go on, or raise, at the same step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI


class Rounds:
    """Non-blocking votes, one at a time. Every method is collective over `comm`."""

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm = comm
        self._votes = np.zeros(2, np.int32)
        self._request: MPI.Request | None = None

    @property
    def pending(self) -> bool:
        """A vote was cast and not yet counted."""
        return self._request is not None

    def ask(self, vote: int) -> None:
        """Cast this rank's vote; returns at once."""
        from mpi4py import MPI  # starts MPI where it isn't running yet: never in a program that only reads

        self._votes[0] = vote
        self._request = self.comm.Iallreduce(self._votes[:1], self._votes[1:], op=MPI.MIN)

    def answer(self) -> int:
        """The smallest vote. Waits for ranks that have not voted yet, without keeping the core busy for long."""
        assert self._request is not None, "nothing was asked"
        pause = 1e-6
        while not self._request.Test():
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)
        self._request = None
        return int(self._votes[1])


class Task:
    """One call in a background thread. What it raises is kept, not printed."""

    def __init__(self, name: str, function: Callable[[], object]) -> None:
        self.value: object = None
        self.error: Exception | None = None
        self._function = function
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.value = self._function()
        except Exception as error:
            self.error = error

    @property
    def finished(self) -> bool:
        """It has returned or raised."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return when it is finished."""
        self._thread.join()


def raise_first(comm: MPI.Comm, error: Exception | None) -> None:
    """Raise the error of the lowest rank that has one, on every rank. Collective over `comm`."""
    for first in comm.allgather(error):
        if first is not None:
            raise first
