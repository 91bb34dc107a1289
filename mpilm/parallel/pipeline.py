"""One step's forward and backward passes on this rank, slot by slot.

With one stage the schedule is gradient accumulation: F0 B0 F1 B1 ... A slot's loss is divided by
the number of slots of the global batch before the backward pass, so that the sum over slots and
ranks is the gradient of the mean loss.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from mpilm.data.loader import Batch


class Slots(Protocol):
    """Whoever collects gradients wants to know which slot they belong to."""

    def begin_slot(self, slot: int) -> None:
        """The next backward pass is that of my slot number `slot`."""

    def end_slot(self) -> None:
        """That backward pass is over."""


class Pipeline:
    """Runs `model(inputs, targets, documents) -> mean loss` over the slots of a batch.

    Args:
        num_slots: Slots of the global batch, over all ranks.
    """

    def __init__(self, model: torch.nn.Module, slots: Slots, *, num_slots: int) -> None:
        self.model, self.slots, self.num_slots = model, slots, num_slots

    def run(self, batch: Batch) -> np.ndarray:
        """Forward and backward of all my slots; returns their losses, float64, nats per token."""
        losses = []
        for slot, micro_batch in enumerate(micro_batches(batch)):
            self.slots.begin_slot(slot)
            loss = self.model(*micro_batch)
            (loss / self.num_slots).backward()
            self.slots.end_slot()
            losses.append(loss.detach())
        return np.array([loss.item() for loss in losses])


def losses(model: torch.nn.Module, batch: Batch) -> np.ndarray:
    """Losses of my slots in evaluation mode, float64, nats per token.

    Blocks record the graph of a backward pass, and it is dropped: so the very code that training compiled is run,
    instead of compiling it once more without gradients.
    """
    model.eval()
    try:
        return np.array([model(*micro_batch).item() for micro_batch in micro_batches(batch)])
    finally:
        model.train()


def micro_batches(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """(inputs, targets, documents) of each slot, [micro_batch_size, sequence_length]."""
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    documents = [None] * len(inputs) if batch.documents is None else torch.from_numpy(batch.documents)
    return list(zip(inputs, targets, documents, strict=True))
