"""Ending before the end: a signal or the time limit reaches one rank, and all of them save and stop at one step.

A signal comes to ranks at different steps, or to one of them only. So it is only written down (asked.py), and after
every step all ranks vote; the answer to a vote is taken at the step after it, by when everyone has voted and nobody
waits.

    step 41 | vote | step 42 | answer: rank 3 got SIGUSR1 | save | exit code 75, "submit me again" (EX_TEMPFAIL)
"""

from __future__ import annotations

import math
import signal
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from mpilm.asked import NOTHING, Asked
from mpilm.checkpoint.agreement import Rounds
from mpilm.comm import p2p
from mpilm.log import say, warn

AGAIN = 75      # EX_TEMPFAIL of sysexits.h
TAG = 1
NOTABLE_S = 30.0    # batch systems count whole seconds, by another clock; people give minutes
TIME = 1 << 20  # a vote, besides numbers of signals and NOTHING; the smallest counts


class Stop:
    """Whether to save and end. Collective over `comm`, all ranks that train or serve.

    Args:
        comm: Private to it.
    """

    def __init__(self, comm: Any, asked: Asked) -> None:
        self.rounds, self.asked = Rounds(comm), asked
        self.left = asked.limit() if comm.rank == 0 else None
        self.save_s = 0.0   # what the last save took
        self.voted, self.between_s = math.nan, 0.0      # when, and the longest time between two votes

    def after_step(self, *, last: bool) -> str | None:
        """Why to stop after this step; None: go on. After the `last` step nothing is asked any more."""
        answer = self.rounds.answer() if self.rounds.pending else NOTHING
        if not last and answer == NOTHING:
            self.rounds.ask(self._vote())
        if answer == NOTHING or last:
            return None
        return "the time is up" if answer == TIME else f"a rank got {signal.Signals(answer).name}"

    def meet(self) -> None:
        """Wait until everyone is done: what is saved last may count only when all is told that it says."""
        p2p.wait([self.rounds.comm.Ibarrier()])

    def _vote(self) -> int:
        now, first = time.monotonic(), math.isnan(self.voted)
        self.between_s = max(self.between_s, 0.0 if first else now - self.voted)
        self.voted = now
        # An answer comes a step after its question, and what is between them may be a validation.
        margin = self.asked.config.stop_before_s + 2 * (self.save_s + self.between_s)
        late = self.left is not None and self.left() < margin and not self._put_off(margin)
        if late and first:
            warn(f"The time is up after two steps: a run ends {margin:,.0f} s before its limit (--run.stop_before_s, "
                 "and what saving takes). Ask for more time.")
        return min(self.asked.signal, self.asked.elsewhere(), TIME if late else NOTHING)

    def _put_off(self, margin: float) -> bool:
        """Whether the limit is not what it was: people have allocations extended, and suspended jobs get their time
        back."""
        left = self.asked.limit(again=True)
        if left is None or self.left is None or left() < max(margin, self.left() + NOTABLE_S):
            return False
        self.left = left
        say(f"The end of the allocation has been put off: {left() / 60:,.0f} minutes are left.")
        return True


class Relay:
    """What ranks that wait, and so have no vote, were asked: they tell rank 0.

    Args:
        comm: All ranks, those who wait and those who vote; nobody else sends on it.
    """

    def __init__(self, comm: Any, asked: Asked) -> None:
        self.comm, self.asked, self.heard = comm, asked, np.array([NOTHING])
        self.told: MPI.Request | None = None
        asked.elsewhere = self.hear if comm.rank == 0 else lambda: NOTHING

    def tell(self) -> None:
        """Pass on what this rank was asked, once; of one that waits."""
        if self.told is None and self.asked.signal != NOTHING and self.comm.rank:
            self.told = self.comm.Isend(np.array([self.asked.signal]), dest=0, tag=TAG)

    def hear(self) -> int:
        """The first signal of a rank that waits; of rank 0."""
        while p2p.has_come(self.comm, tag=TAG):
            told = np.empty_like(self.heard)
            self.comm.Recv(told, tag=TAG)
            np.minimum(self.heard, told, out=self.heard)
        return int(self.heard[0])
