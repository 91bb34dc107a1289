"""The update: clip by the global norm, learning rate, AdamW on flat memory.

    update.begin(step)                       the learning rate of this step
    scale = update.accept(grad_norm)         None: a NaN or infinite norm, nobody updates
    update.apply(flat, scale)                on whatever run of the flat buckets this rank owns

The arithmetic is elementwise, so a run may be cut anywhere at a multiple of 16 elements without
changing a bit. AdamW is arXiv 1711.05101; the schedules are arXiv 1608.03983 (cosine) and
2404.06395 (warm-up, stable, decay).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from mpilm.config import Optim
from mpilm.flat import Flat
from mpilm.log import UserError

# Elements of one pass: the weights are rounded from masters still in the cache, and the calls cost nothing beside it. A
# GPU has no such cache, and its calls cost something.
CHUNK = 1 << 18


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The learning rate of update number `step` (from 0) out of `steps`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    return optim.lr * SCHEDULES[optim.schedule](optim, step, steps)


def _cosine(optim: Optim, step: int, steps: int) -> float:
    progress = min(1.0, (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps))
    return optim.min_lr + (1 - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def _wsd(optim: Optim, step: int, steps: int) -> float:
    decay_steps = max(1, round(optim.decay_fraction * steps))
    progress = min(1.0, max(0, step - (steps - decay_steps)) / decay_steps)
    return 1 - (1 - optim.min_lr) * progress


SCHEDULES = {"cosine": _cosine, "wsd": _wsd}


class Update:
    """AdamW with clipping and a schedule.

    `applied` counts the updates that were made and `skipped_in_a_row` those left out since the last one.
    """

    STATES: ClassVar[tuple[str, ...]] = ("adam_m", "adam_v")

    def __init__(self, optim: Optim, steps: int) -> None:
        self.optim, self.steps = optim, steps
        self.applied = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.lr = 0.0

    def begin(self, step: int) -> None:
        """Set the learning rate of `step`."""
        self.lr = learning_rate(self.optim, step, self.steps)

    def accept(self, grad_norm: float) -> float | None:
        """What gradients of this global norm are multiplied by; None if the step must be skipped."""
        if not math.isfinite(grad_norm):
            self.skipped += 1
            self.skipped_in_a_row += 1
            return None
        self.applied += 1
        self.skipped_in_a_row = 0
        clip = self.optim.clip
        return min(1.0, clip / (grad_norm + 1e-6)) if clip else 1.0

    def apply(self, flat: Flat, scale: float) -> None:
        """One AdamW update of a run of flat memory; its gradients are used up."""
        device = flat.masters.device
        length = CHUNK if device.type == "cpu" else max(1, flat.masters.numel())
        number, divisor = (torch.full((), value, dtype=torch.float32, device=device)    # nothing is waited for
                           for value in (self.applied, 1.0 / scale))
        whole = (flat.masters, flat.weights, flat.gradients, *flat.states)
        for masters, weights, gradients, m, v in zip(*(array.split(length) for array in whole), strict=True):
            self._apply_chunk(masters, gradients, m, v, number, divisor, decay=flat.decay)
            if weights.data_ptr() != masters.data_ptr():
                weights.copy_(masters)

    def _apply_chunk(self, masters: Tensor, gradients: Tensor, m: Tensor, v: Tensor, number: Tensor, divisor: Tensor, *,
                     decay: bool) -> None:
        """What torch.optim.adamw.adamw(fused=True) calls, without what that does in Python for every chunk. `number` is
        this update's, from 1: what that would have counted up to."""
        torch._fused_adamw_([masters], [gradients], [m], [v], [], [number], amsgrad=False, maximize=False,
                            grad_scale=divisor, lr=self.lr, beta1=self.optim.beta1, beta2=self.optim.beta2,
                            eps=self.optim.eps, weight_decay=self.optim.weight_decay if decay else 0.0)


class Sgd(Update):
    """Plain stochastic gradient descent: w -= lr * (g + weight_decay * w), with the same clipping and schedule."""

    STATES: ClassVar[tuple[str, ...]] = ()

    def apply(self, flat: Flat, scale: float) -> None:
        """One update of a run of flat memory; its gradients are used up."""
        gradient = flat.gradients.mul_(scale)
        if flat.decay:
            gradient.add_(flat.masters, alpha=self.optim.weight_decay)
        flat.masters.sub_(gradient, alpha=self.lr)
        if flat.weights.data_ptr() != flat.masters.data_ptr():
            flat.weights.copy_(flat.masters)


MENU = {"adamw": Update, "sgd": Sgd}


def get(name: str) -> type[Update]:
    """The optimizer of that name.

    Raises:
        UserError: There is none; the message lists those there are.
    """
    if name not in MENU:
        raise UserError(f"optimizer {name!r}: there is no such choice; give one of {', '.join(MENU)}.")
    return MENU[name]
