"""Flat memory: what a synchronizer hands to the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Flat:
    """A run of flat memory: float32 masters, gradients and optimizer states, and the weights the model computes with.

    All are 1-D and of equal length; `weights` may be the same memory as `masters`.
    """

    masters: torch.Tensor
    weights: torch.Tensor
    gradients: torch.Tensor
    states: tuple[torch.Tensor, ...]
    decay: bool


class Update(Protocol):
    """A rule that turns gradients into new parameters; local, and it cannot fail.

    Attributes:
        lr: Of the next update.
        applied, skipped, skipped_in_a_row: Updates that were made, left out, and left out since the last one.
    """

    lr: float
    applied: int
    skipped: int
    skipped_in_a_row: int

    def begin(self, step: int) -> None:
        """The next update is that of `step`."""

    def accept(self, grad_norm: float) -> float | None:
        """What gradients of this global norm are multiplied by; None if the step must be skipped."""

    def apply(self, flat: Flat, scale: float) -> None:
        """Update a run of flat memory, cut anywhere at a multiple of 16 elements."""
