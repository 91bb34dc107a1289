"""Attention over keys that come one tile after the other, in any order: the online softmax.

A tile of queries keeps the largest score it has seen, the sum of its exponentials and the weighted sum of values, both
relative to that score; a new tile of keys rescales them. So all scores are never there at once, and where the keys come
from does not matter (arXiv 1805.02867; by tiles, with the backward pass from the log-sum-exp, arXiv 2205.14135).

    rows = Rows(q)                                  q [N, R, D]
    for k, v in tiles: rows.see(k, v, hidden)       k and v [N, S, D]
    y, lse = rows.result()
    dq, dk, dv = gradients(q, k, v, dy, lse, delta, hidden)      of one tile, given lse and delta of all

Products run in the operands' dtype, everything else in float32 (float64 where that is what is computed with).

N = kv_heads x B, R = rows of queries that meet one tile of keys: their tokens x (heads / kv_heads).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """A tile of queries [N, R, D], divided by sqrt(D), and what it has seen so far."""

    def __init__(self, q: Tensor) -> None:
        self.q = q
        exact = q.new_empty(0, dtype=exact_dtype(q))
        self.top = exact.new_full((*q.shape[:2], 1), -torch.inf)
        self.total = exact.new_zeros((*q.shape[:2], 1))
        self.summed = exact.new_zeros(q.shape)

    def see(self, k: Tensor, v: Tensor, hidden: Tensor | None) -> None:
        """Attend to one more tile of keys and values [N, S, D].

        Args:
            hidden: What may not be seen; see `scores`. A row must see some key of the first tile it is given.
        """
        weights = scores(self.q, k, hidden)
        top = torch.maximum(self.top, weights.amax(-1, keepdim=True))
        weights.sub_(top).exp_()
        fade = self.top.sub_(top).exp_()
        self.top = top
        self.total.mul_(fade).add_(weights.sum(-1, keepdim=True))
        self.summed.mul_(fade).add_(torch.bmm(weights.to(v.dtype), v))

    def result(self) -> tuple[Tensor, Tensor]:
        """(weighted values [N, R, D] in the queries' dtype, log of the sum of exponentials [N, R, 1])."""
        return self.summed.div_(self.total).to(self.q.dtype), self.total.log_().add_(self.top)


def gradients(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, lse: Tensor, delta: Tensor,
              hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What one tile of scores adds to the gradients of q, k and v, in their dtype.

    Args:
        dy: Gradient of the weighted values [N, R, D].
        lse: Log of the sum of exponentials over all keys, [N, R, 1].
        delta: Sum over D of dy times weighted values, [N, R, 1].
    """
    weights = scores(q, k, hidden).sub_(lse).exp_()
    dv = torch.bmm(weights.to(dy.dtype).mT, dy)
    ds = torch.bmm(dy, v.mT).to(weights.dtype).sub_(delta).mul_(weights).to(q.dtype)
    return torch.bmm(ds, k), torch.bmm(ds.mT, q), dv


def scores(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    """q k^T [N, R, S], -inf where hidden.

    Args:
        hidden: Bools [B or 1, 1, queries, S], true where a query may not look; None: everything is seen.
    """
    found = torch.bmm(q, k.mT).to(exact_dtype(q))
    if hidden is not None:
        split = found.view(-1, hidden.shape[0], found.shape[1] // hidden.shape[2], *hidden.shape[2:])
        split.masked_fill_(hidden, -torch.inf)
    return found


def exact_dtype(x: Tensor) -> torch.dtype:
    """Of sums that lose bits."""
    return torch.promote_types(x.dtype, torch.float32)
