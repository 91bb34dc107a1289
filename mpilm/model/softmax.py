"""What the head makes of logits: how surprising the right tokens are, and softmax minus one-hot.

    softmax = Softmax()
    surprises, gradient = softmax.gradient(logits, goals, 1024)      # one row of 1024 a token
    softmax.surprise(logits, goals)                                  # their sum, for whoever wants no gradient

Sums and exponentials are float32 (float64 where that is what is computed with). Where ranks share the vocabulary,
`parallel/vocabulary.py` has the same over all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mpilm.model.precision import wide


class Softmax:
    """Over the whole vocabulary."""

    def __init__(self) -> None:
        self.whole: Callable[[Tensor, float], tuple[Tensor, Tensor]] = whole

    def compile(self) -> None:
        """Compile it, on the first call."""
        self.whole = torch.compile(self.whole, dynamic=False)

    def gradient(self, logits: Tensor, goals: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """(-log of each goal's probability, float32 [rows]; its gradient / number in the logits' dtype [rows, V])."""
        hits = torch.arange(len(logits), device=logits.device), goals
        hit = wide(logits[hits])
        total, gradient = self.whole(logits, 1 / number)
        surprises = total - hit
        gradient[hits] = (torch.expm1(-surprises) / number).to(gradient.dtype)     # scatter_ would copy it all
        return surprises, gradient

    def surprise(self, logits: Tensor, goals: Tensor) -> Tensor:
        """Their sum, a scalar."""
        return F.cross_entropy(wide(logits), goals, reduction="sum")


def whole(logits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(log of the sum of exponentials, float32 [rows]; softmax * scale in the logits' dtype)."""
    exact = wide(logits)
    total = exact.logsumexp(-1)
    return total, ((exact - total[:, None]).exp() * scale).to(logits.dtype)
