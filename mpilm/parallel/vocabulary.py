"""Cross-entropy over a vocabulary that ranks share: none ever has all logits of a token, and two numbers travel.

    rank 0    logits of words    0 ...  511     log of their sum of exponentials, logit of the right word or 0
    rank 1    logits of words  512 ... 1023     likewise                            -> everyone -> both, over all words

Rows are gone through in chunks (model/head.py); each chunk is one exchange.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mpilm.model import softmax
from mpilm.model.precision import wide
from mpilm.parallel.exchange import Exchange, total


class Softmax(softmax.Softmax):
    """Over the words of all ranks, of which `count` are mine. Its methods are collective over those of `exchange`."""

    def __init__(self, exchange: Exchange, count: int) -> None:
        self.exchange, self.count = exchange, count
        self.sums: Callable[[Tensor], Tensor] = sums
        self.weights: Callable[[Tensor, Tensor, float], Tensor] = weights

    def compile(self) -> None:
        """As softmax.Softmax."""
        self.sums = torch.compile(self.sums, dynamic=False)
        self.weights = torch.compile(self.weights, dynamic=False)

    def gradient(self, logits: Tensor, goals: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """As softmax.Softmax, of my words; goals are those of all."""
        mine, hits = self._hits(goals)
        over, hit = self._everywhere(logits, mine, hits)
        gradient, surprises = self.weights(logits, over, 1 / number), over - hit
        at_hits = (torch.expm1(-surprises) / number).to(gradient.dtype)
        gradient[hits] = torch.where(mine, at_hits, gradient[hits])
        return surprises, gradient

    def surprise(self, logits: Tensor, goals: Tensor) -> Tensor:
        """As softmax.Softmax."""
        over, hit = self._everywhere(logits, *self._hits(goals))
        return (over - hit).sum()

    def _hits(self, goals: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(whether each row's right word is mine, its place [row, word] among mine, or any of that row's places).

        How many are mine is not asked: a GPU would have to be waited for.
        """
        at = goals - self.exchange.rank * self.count
        return (at >= 0) & (at < self.count), (torch.arange(len(at), device=at.device), at.clamp(0, self.count - 1))

    def _everywhere(self, logits: Tensor, mine: Tensor, hits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(log of the sum of exponentials over all words, logit of the right word), float32 [rows], on every rank."""
        over = self.sums(logits)
        hit = torch.where(mine, wide(logits[hits]), 0.0)
        everyone = self.exchange.gather(torch.stack((over, hit))[None], 0)
        return everyone[:, 0].logsumexp(0), total(everyone[:, 1].unbind())


def sums(logits: Tensor) -> Tensor:
    """Log of the sum of exponentials of my words, float32 [rows]."""
    return wide(logits).logsumexp(-1)


def weights(logits: Tensor, over: Tensor, scale: float) -> Tensor:
    """Softmax * scale of my words in the logits' dtype, given the log of the sum of exponentials over all."""
    return ((wide(logits) - over[:, None]).exp() * scale).to(logits.dtype)
