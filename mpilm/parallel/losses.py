"""The mean loss over slots, the same bits whoever computed which."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class Losses:
    """Mean over slots that are dealt to the ranks of `comm` in runs; the sum does not depend on the runs."""

    def __init__(self, comm: Any, runs: list[range]) -> None:
        self.comm, self.counts = comm, [len(run) for run in runs]

    def mean(self, mine: np.ndarray) -> float:
        """Mean over all slots' losses, float64. Collective."""
        everyone = np.empty(sum(self.counts))
        self.comm.Allgatherv(mine, (everyone, self.counts))
        return math.fsum(everyone) / everyone.size
