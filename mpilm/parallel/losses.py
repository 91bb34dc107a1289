"""The losses of slots, which a GPU may still be computing, and their mean, the same bits whoever computed which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpilm.comm.devices import Device


class SlotLosses:
    """Of one rank's slots, float64, nats per token; NumPy takes it as an array, and then it waits for a GPU.

    Args:
        results: Slot -> its loss, of those that this rank has; the other slots have 0.
        count: Slots of this rank.
        device: Where they are computed, on the current stream.
    """

    def __init__(self, results: Mapping[int, Tensor], count: int, device: Device) -> None:
        self.slots, self.count, self.device = list(results), count, device
        values = torch.stack(list(results.values())).double() if results else torch.empty(0)
        # What is copied to pinned memory is not waited for.
        self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self.values.copy_(values, non_blocking=True)
        self.copied = device.record()

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        self.device.wait(self.copied)
        losses = np.zeros(self.count, dtype)
        losses[self.slots] = self.values.numpy()
        return losses


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

    def mean(self, mine: npt.ArrayLike) -> float:
        """Mean over all slots' losses, float64, the same on every rank. Collective over `stages`, then over `comm`."""
        mine = np.asarray(mine)
        self.stages.Bcast(mine, root=self.stages.size - 1)
        everyone = np.empty(sum(self.counts))
        self.comm.Allgatherv(mine, (everyone, self.counts))
        return math.fsum(everyone) / everyone.size
