"""The update: clip by the global norm, learning rate, AdamW on flat memory.

    update.begin(step)                       the learning rate of this step
    scale = update.accept(grad_norm)         None: a NaN or infinite norm, nobody updates
    update.apply(flat, scale)                on whatever run of the flat buckets this rank owns

On a CPU an update waits for memory. Compiled, it goes through all of it once, and adds up gradients on the way.

The arithmetic is elementwise, so a run may be cut anywhere at a multiple of 16 elements without
changing a bit. AdamW is arXiv 1711.05101; the schedules are arXiv 1608.03983 (cosine) and
2404.06395 (warm-up, stable, decay).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mpilm.bridge import rebased
from mpilm.config import Optim
from mpilm.flat import Flat, add, compile_code
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
    begin = max(optim.warmup_steps, steps - max(1, round(optim.decay_fraction * steps)))
    progress = min(1.0, max(0, step - begin) / max(1, steps - begin))
    return 1 - (1 - optim.min_lr) * progress


SCHEDULES = {"cosine": _cosine, "wsd": _wsd}


def adamw(masters: Tensor, weights: Tensor | None, gradients: Sequence[Tensor], m: Tensor, v: Tensor, scale: Tensor,
          decay: Tensor, beta1_rest: Tensor, beta2: Tensor, beta2_rest: Tensor, step_size: Tensor, root: Tensor,
          eps: Tensor) -> None:
    """One update, in place; every element by itself. `weights` None: they are the masters.

    Args:
        scale: Of the sum of `gradients`.
        decay: lr * weight decay. (1 minus it, in float32, would lose most of a small one.)
        beta1_rest, beta2_rest: 1 - beta1, 1 - beta2.
        step_size, root: lr / (1 - beta1^n); 1 / the square root of 1 - beta2^n.
    """
    gradient = add(gradients) * scale
    m.add_((gradient - m) * beta1_rest)
    v.mul_(beta2).add_(gradient * gradient * beta2_rest)
    masters.sub_(masters * decay + step_size * m / (v.sqrt() * root + eps))
    if weights is not None:
        weights.copy_(masters)


class Update:
    """AdamW with clipping and a schedule.

    `applied` counts the updates that were made and `skipped_in_a_row` those left out since the last one.

    Args:
        compiled: Compile it, on the first call; for memory of a CPU.
    """

    STATES: ClassVar[tuple[str, ...]] = ("adam_m", "adam_v")
    ONE_PASS: ClassVar[Callable[..., None] | None] = staticmethod(adamw)    # what is compiled

    def __init__(self, optim: Optim, steps: int, *, compiled: bool = False) -> None:
        self.optim, self.steps = optim, steps
        self.applied = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.lr = 0.0
        self.adds = compiled and self.ONE_PASS is not None

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
        """One AdamW update of a run of flat memory; its gradients may be used up."""
        if self.adds:
            self._apply_compiled(flat, scale)
            return
        gradient, = flat.gradients
        device = flat.masters.device
        length = CHUNK if device.type == "cpu" else max(1, flat.masters.numel())
        number, divisor = (torch.full((), value, dtype=torch.float32, device=device)    # nothing is waited for
                           for value in (self.applied, 1.0 / scale))
        whole = (flat.masters, flat.weights, gradient, *flat.states)
        for masters, weights, gradients, m, v in zip(*(array.split(length) for array in whole), strict=True):
            self._apply_chunk(masters, gradients, m, v, number, divisor, decay=flat.decay)
            if flat.apart:
                weights.copy_(masters)

    def _apply_compiled(self, flat: Flat, scale: float) -> None:
        assert self.ONE_PASS is not None, "there is nothing to compile"
        compile_code(self.ONE_PASS, len(flat.gradients), flat.apart)(
            rebased(flat.masters), rebased(flat.weights) if flat.apart else None, tuple(map(rebased, flat.gradients)),
            *map(rebased, flat.states), *self._factors(scale, decay=flat.decay))

    def _apply_chunk(self, masters: Tensor, gradients: Tensor, m: Tensor, v: Tensor, number: Tensor, divisor: Tensor, *,
                     decay: bool) -> None:
        """What torch.optim.adamw.adamw(fused=True) calls, without what that does in Python for every chunk. `number` is
        this update's, from 1: what that would have counted up to."""
        torch._fused_adamw_([masters], [gradients], [m], [v], [], [number], amsgrad=False, maximize=False,
                            grad_scale=divisor, lr=self.lr, beta1=self.optim.beta1, beta2=self.optim.beta2,
                            eps=self.optim.eps, weight_decay=self.optim.weight_decay if decay else 0.0)

    def _factors(self, scale: float, *, decay: bool) -> tuple[Tensor, ...]:
        """What `adamw` multiplies with, as tensors: a new number is no reason to compile anew."""
        optim, number = self.optim, self.applied
        factors = (scale, self.lr * optim.weight_decay if decay else 0.0, 1 - optim.beta1, optim.beta2,
                   1 - optim.beta2, self.lr / (1 - optim.beta1 ** number), 1 / math.sqrt(1 - optim.beta2 ** number),
                   optim.eps)
        return torch.tensor(factors, dtype=torch.float32).unbind()


class Sgd(Update):
    """Plain stochastic gradient descent: w -= lr * (g + weight_decay * w), with the same clipping and schedule."""

    STATES: ClassVar[tuple[str, ...]] = ()
    ONE_PASS = None

    def apply(self, flat: Flat, scale: float) -> None:
        """One update of a run of flat memory; its gradients are used up."""
        gradient = flat.gradients[0].mul_(scale)
        if flat.decay:
            gradient.add_(flat.masters, alpha=self.optim.weight_decay)
        flat.masters.sub_(gradient, alpha=self.lr)
        if flat.apart:
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
