"""The output head: logits, or the loss with its gradient computed on the way.

The gradient of a cross-entropy is known as soon as the logits are: softmax minus one-hot. So the loss computes it in
place of the logits and multiplies at once with weights and inputs; no logits are kept, in float32 least of all, and a
long vocabulary is gone through in chunks of rows. The backward pass has only to scale.

    rows -> logits (bf16) -> softmax - one-hot, in place -> d_rows, d_weight
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpilm.model.precision import wide

CHUNK = 1 << 25     # logits that are held at a time: 64 MiB of bf16


class Head(nn.Linear):
    """Rows [..., C] -> logits [..., V], or the mean loss (nats, float32 scalar) against targets [...]."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, bias=False)
        self.softmax: Callable[[Tensor, float], tuple[Tensor, Tensor]] = softmax

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean loss. In evaluation mode, or without gradients, nothing is computed for a backward pass."""
        x, targets = x.flatten(0, -2), targets.flatten()
        if self.training and torch.is_grad_enabled():
            loss: Tensor = _Loss.apply(x, self.weight, targets, self.softmax)
            return loss
        parts = [F.cross_entropy(wide(self(rows)), goals, reduction="sum")
                 for rows, goals in _chunks(x, targets, self.out_features)]
        return torch.stack(parts).sum() / len(x)


def softmax(logits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(log of the sum of exponentials, float32 [rows]; softmax * scale in the logits' dtype)."""
    exact = wide(logits)
    total = exact.logsumexp(-1)
    return total, ((exact - total[:, None]).exp() * scale).to(logits.dtype)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor,
                softmax: Callable[[Tensor, float], tuple[Tensor, Tensor]]) -> Tensor:
        dx, dweight, losses = [], None, []
        for rows, goals in _chunks(x, targets, len(weight)):
            logits = rows @ weight.t()
            hits = torch.arange(len(rows), device=x.device), goals
            hit = wide(logits[hits])
            total, gradient = softmax(logits, 1 / len(x))
            surprise = total - hit
            gradient[hits] = (torch.expm1(-surprise) / len(x)).to(gradient.dtype)     # scatter_ would copy it all
            losses.append(surprise.sum())
            dx.append(gradient @ weight)
            dweight = gradient.t() @ rows if dweight is None else dweight.addmm_(gradient.t(), rows)
        ctx.save_for_backward(torch.cat(dx) if len(dx) > 1 else dx[0], dweight)
        return torch.stack(losses).sum() / len(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        scale = gradients[0]
        return dx * scale, dweight * scale, None, None


def _chunks(x: Tensor, targets: Tensor, vocab_size: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and their targets, so many at a time that their logits are at most CHUNK."""
    rows = max(1, CHUNK // vocab_size)
    return list(zip(x.split(rows), targets.split(rows), strict=True))
