"""The mean loss over slots, the same bits whoever computed which."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class Losses:
    """Mean over slots that are dealt to the ranks of `comm` in runs; the sum does not depend on the runs.

    Args:
        runs: The slots of every replica. Where `comm` has more ranks, as many as it has more share each run, one next
            to the other, and each has the mean loss of as many of its tokens.
        stages: The pipeline whose last rank has the losses.
    """

    def __init__(self, comm: Any, runs: list[range], stages: Any) -> None:
        self.comm, self.stages = comm, stages
        self.counts = [len(run) for run in runs for _ in range(comm.size // len(runs))]

    def mean(self, mine: np.ndarray) -> float:
        """Mean over all slots' losses, float64, the same on every rank. Collective over `stages`, then over `comm`."""
        self.stages.Bcast(mine, root=self.stages.size - 1)
        everyone = np.empty(sum(self.counts))
        self.comm.Allgatherv(mine, (everyone, self.counts))
        return math.fsum(everyone) / everyone.size
