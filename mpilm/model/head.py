"""The output head: logits, or the loss with its gradient computed on the way.

The gradient of a cross-entropy is known as soon as the logits are: softmax minus one-hot. So the loss computes it in
place of the logits and multiplies at once with weights and inputs; no logits are kept, in float32 least of all, and a
long vocabulary is gone through in chunks of rows. Where it is known what the loss will be divided by, the gradient is
too, and nothing is left for the backward pass to do.

    rows -> logits (bf16) -> softmax - one-hot, in place -> d_rows, d_weight
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpilm.model.precision import wide
from mpilm.model.softmax import Softmax
from mpilm.model.split import ALONE, Alone

CHUNK = 1 << 25     # logits that are held at a time: 64 MiB of bf16
GPU_CHUNK = 1 << 28     # 512 MiB; products of fewer rows leave most of a GPU idle


class Head(nn.Linear):
    """Rows [..., C] -> logits [..., V], or the mean loss (nats, float32 scalar) against targets [...]; of a vocabulary
    that ranks share, logits are those of my part of it.

    Attributes:
        divisor: What the loss is divided by before its backward pass begins, if the caller knows.
    """

    divisor = 1

    def __init__(self, width: int, vocab_size: int, split: Alone = ALONE) -> None:
        super().__init__(width, split.of(vocab_size), bias=False)
        self.split, self.softmax = split, split.softmax(vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of everyone's rows."""
        y: Tensor = super().forward(self.split.gather(x))
        return y

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean loss. In evaluation mode, or without gradients, nothing is computed for a backward pass."""
        x, targets = self.split.gather(x).flatten(0, -2), targets.flatten()
        if self.training and torch.is_grad_enabled():
            loss: Tensor = _Loss.apply(x, self.weight, targets, self.softmax, self.divisor)
            return loss
        with torch.no_grad():   # though whoever evaluates records a graph, to run the very code that training compiled
            parts = [self.softmax.surprise(F.linear(rows, self.weight), goals)
                     for rows, goals in _chunks(x, targets, self.out_features)]
            return torch.stack(parts).sum() / len(x)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softmax: Softmax, divisor: int) -> Tensor:
        dx, losses = [], []
        dweight: Any = None
        for rows, goals in _chunks(x, targets, len(weight)):
            surprises, gradient = softmax.gradient(rows @ weight.t(), goals, len(x) * divisor)
            losses.append(surprises.sum())
            dx.append(gradient @ weight)
            part = gradient.t() @ rows
            dweight = part if dweight is None else wide(dweight).add_(part)     # rounded once, not in every chunk
        ctx.divisor = divisor
        ctx.save_for_backward(torch.cat(dx) if len(dx) > 1 else dx[0], dweight.to(weight.dtype))
        return torch.stack(losses).sum() / len(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        given = gradients[0]
        if given.device.type == "cpu" and given == 1 / ctx.divisor:     # a GPU would have to be waited for, to know
            return dx, dweight, None, None, None
        scale = given * ctx.divisor
        return dx * scale, dweight * scale, None, None, None


def _chunks(x: Tensor, targets: Tensor, vocab_size: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and their targets, so many at a time that their logits are at most CHUNK."""
    rows = max(1, (CHUNK if x.device.type == "cpu" else GPU_CHUNK) // vocab_size)
    return list(zip(x.split(rows), targets.split(rows), strict=True))
