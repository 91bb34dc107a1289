"""What a server tells a worker beside the parameters: as one small array of float64."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, fields

import numpy as np

from mpilm.flat import Update
from mpilm.sync._staleness import BINS, Staleness


@dataclass
class Reply:
    """Counts are of the whole run, but `version` and `staleness` of this job.

    Args:
        version: Of the parameters.
        done: Steps of the whole batch that all workers together have done.
        grad_norm: Of the last update, which may have been another worker's.
        lr: Its learning rate.
        applied, skipped, skipped_in_a_row: As in optim.Update.
        staleness: Of all gradients so far.
    """

    version: int = 0
    done: float = 0.0
    grad_norm: float = np.nan
    lr: float = 0.0
    applied: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    staleness: Staleness = field(default_factory=Staleness)

    def to_array(self) -> np.ndarray:
        """[SIZE] float64, which is exact for whole numbers up to 2^53."""
        plain = astuple(self)[:-1]
        return np.array([*plain, self.staleness.total, self.staleness.most, *self.staleness.counts], np.float64)

    @classmethod
    def from_array(cls, array: np.ndarray) -> Reply:
        """What `to_array` made."""
        version, done, grad_norm, lr, applied, skipped, in_a_row, total, most, *counts = array.tolist()
        staleness = Staleness([int(count) for count in counts], int(total), int(most))
        return cls(int(version), done, grad_norm, lr, int(applied), int(skipped), int(in_a_row), staleness)

    def tell(self, update: Update) -> None:
        """Let a worker's update know what was done in its place."""
        update.lr = self.lr
        update.applied, update.skipped, update.skipped_in_a_row = self.applied, self.skipped, self.skipped_in_a_row


SIZE = len(fields(Reply)) - 1 + 2 + BINS
