"""Whether this rank has been asked to end: by a signal, or by the time limit. Facts of one rank, no MPI; see stop.py.

    with Asked(config.run, for_good=True) as asked, launch.session():
        left = asked.limit()    # None, or a function: seconds that are left

A signal may come at any moment: while libraries load and ranks find each other, which takes its time on many nodes, or
when all is saved already and the process is about to end, because the batch system's signal and the program's own look
at the clock come at the same time. Neither may end a rank by the signal, with an exit code that nobody resubmits. So it
is heeded before the session begins, as soon as the options are read, until the process ends.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from mpilm.allocation import ANSWER_S, ends_at
from mpilm.config import Run
from mpilm.log import UserError

NOTHING = 1 << 21   # no signal has such a number; the smallest counts


class Asked:
    """What this rank has been asked: as a context it heeds signals, and remembers the first. Local.

    Args:
        for_good: After the context the process has nothing left to do but end, and signals are ignored. Otherwise
            they do again what they did before.

    Attributes:
        elsewhere: What ranks that have no vote of their own were asked; NOTHING, or a signal.

    Raises:
        UserError: `run.stop_signals` names what is no signal.
    """

    def __init__(self, config: Run, *, for_good: bool = False) -> None:
        self.config, self.signal, self.started, self.for_good = config, NOTHING, time.monotonic(), for_good
        self.elsewhere: Callable[[], int] = lambda: NOTHING
        self.numbers, self.handlers = numbers(config.stop_signals), dict[int, Any]()

    def __enter__(self) -> Asked:
        self.handlers = {number: signal.signal(number, self._heed) for number in self.numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, signal.SIG_IGN if self.for_good else handler)

    def _heed(self, number: int, frame: FrameType | None) -> None:
        self.signal = min(self.signal, number)

    def limit(self, *, again: bool = False) -> Callable[[], float] | None:
        """Tells the seconds until this job must have ended; None: it need not, or nobody can tell.

        What the user allows is counted by a clock that nobody sets; the end of an allocation is a time of day. The
        batch system that is asked `again`, when little is left, must not use that up.
        """
        given = self.config.time_limit_s
        if given:
            return lambda: self.started + given - time.monotonic()
        patience_s = min(ANSWER_S, self.config.stop_before_s / 4) if again else ANSWER_S
        end = ends_at(os.environ, again=again, patience_s=patience_s)
        return None if end is None else lambda: end - time.time()


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
