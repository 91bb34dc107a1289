"""How often a run is saved: every so many steps, or as often as loses least time to saving and to failures together.

    saving costs      d of every interval t          d / t
    a failure costs   half an interval, and comes    t / 2M      once in M, the mean time between failures
    least in all at   t = sqrt(2 d M)                (Young 1974), with Daly's correction (2006) where d is not small

What a save costs is the time for which it holds training up; it is written while training goes on. No interval is
shorter than the writing, for there is one save at a time.
"""

from __future__ import annotations

import math
import time
from typing import Any

from mpilm.checkpoint import Saved
from mpilm.config import Checkpoint
from mpilm.log import say

FIRST = 10      # steps to the first save of `auto`, by which it learns what one costs
HOUR_S = 3600.0


def optimal(save_s: float, mtbf_s: float) -> float:
    """Seconds between saves that cost `save_s` each, with a failure every `mtbf_s` (Daly 2006, equation 37)."""
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    part = math.sqrt(save_s / (2 * mtbf_s))
    return math.sqrt(2 * save_s * mtbf_s) * (1 + part / 3 + part**2 / 9) - save_s


class Interval:
    """Which steps are saved. Every rank asks at every step.

    Args:
        step: Where the run goes on.
    """

    def __init__(self, config: Checkpoint, step: int) -> None:
        self.config, self.next = config, step + FIRST
        self.began, self.step = time.monotonic(), step

    def due(self, step: int) -> bool:
        """Whether to save after so many steps."""
        if self.config.every == "auto":
            return step >= self.next
        return self.config.every > 0 and step % self.config.every == 0

    def saved(self, step: int) -> None:
        """It was saved after so many steps; `auto` waits until that is written before it decides about the next."""
        self.next, self.step_s = 2**62, (time.monotonic() - self.began) / max(1, step - self.step)
        self.last = step

    def learn(self, saved: Saved, comm: Any) -> None:
        """What a save took. Collective over `comm`: rank 0's clock counts."""
        if self.config.every != "auto":
            return
        wanted = max(optimal(saved.stall_s, self.config.mtbf_h * HOUR_S), saved.write_s)
        steps: int = comm.bcast(max(1, math.ceil(wanted / self.step_s)))
        self.next = self.last + steps
        say(f"saving every {steps:,} steps: a save holds training up for {saved.stall_s:.3f} s and a step takes "
            f"{self.step_s:.3g} s, with {self.config.mtbf_h:g} h between failures")
