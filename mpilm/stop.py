"""Ending before the end: a signal or the time limit reaches one rank, and all of them save and stop at one step.

A signal comes to ranks at different steps, or to one of them only. So the handler only writes it down, and after every
step all ranks vote; the answer to a vote is taken at the step after it, by when everyone has voted and nobody waits.

    step 41 | vote | step 42 | answer: rank 3 got SIGUSR1 | save | exit code 75, "submit me again" (EX_TEMPFAIL)
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from mpilm.allocation import ends_at
from mpilm.checkpoint.agreement import Rounds
from mpilm.config import Run
from mpilm.log import UserError

AGAIN = 75      # EX_TEMPFAIL of sysexits.h
TIME, NOTHING = 1 << 20, 1 << 21    # votes, besides numbers of signals; the smallest counts


class Asked:
    """What this rank has been asked: as a context it heeds signals, and remembers the first. Local.

    Raises:
        UserError: `run.stop_signals` names what is no signal.
    """

    def __init__(self, config: Run) -> None:
        self.config, self.signal, self.started = config, NOTHING, time.time()
        self.numbers, self.handlers = numbers(config.stop_signals), dict[int, Any]()

    def __enter__(self) -> Asked:
        self.handlers = {number: signal.signal(number, self._heed) for number in self.numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _heed(self, number: int, frame: FrameType | None) -> None:
        self.signal = min(self.signal, number)

    def limit(self) -> float | None:
        """When this job must have ended, in seconds since 1970; None: never."""
        given = self.config.time_limit_s
        return self.started + given if given else ends_at(os.environ)


class Stop:
    """Whether to save and end. Collective over `comm`, all ranks that train or serve.

    Args:
        comm: Private to it.
    """

    def __init__(self, comm: Any, asked: Asked) -> None:
        self.rounds, self.asked = Rounds(comm), asked
        self.end = asked.limit() if comm.rank == 0 else None
        self.save_s = 0.0   # what the last save took

    def after_step(self, *, last: bool) -> str | None:
        """Why to stop after this step; None: go on. After the `last` step nothing is asked any more."""
        answer = self.rounds.answer() if self.rounds.pending else NOTHING
        if not last and answer == NOTHING:
            self.rounds.ask(self._vote())
        if answer == NOTHING or last:
            return None
        return "the time is up" if answer == TIME else f"a rank got {signal.Signals(answer).name}"

    def _vote(self) -> int:
        margin = self.asked.config.stop_before_s + 2 * self.save_s
        late = self.end is not None and time.time() + margin > self.end
        return min(self.asked.signal, TIME if late else NOTHING)


def numbers(names: str) -> list[int]:
    """The signals of a list such as USR1,TERM.

    Raises:
        UserError: There is no such signal.
    """
    found = []
    for name in filter(None, (part.strip().upper().removeprefix("SIG") for part in names.split(","))):
        number = getattr(signal, f"SIG{name}", None)
        if not isinstance(number, signal.Signals) or number in (signal.SIGKILL, signal.SIGSTOP):
            raise UserError(f"--run.stop_signals {names}: {name} is no signal that a program can heed; give some of "
                            "USR1,USR2,TERM,INT,HUP, with commas between.")
        found.append(int(number))
    return found
