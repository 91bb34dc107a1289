"""A sequence that grows: keys and values of its tokens are kept (a KV cache), so that one token more costs one token.

    cache = Cache()
    model = GPT(shape, context=cache)
    model(prompt)                   # [1, T]: logits of all
    model(token)                    # [1, 1]: the logits that it would have at the end of the whole sequence
    cache.clear()                   # another sequence begins
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mpilm.model.context import Whole


class Cache(Whole):
    """Of a whole model; not for training.

    Attributes:
        length: Tokens that it has seen since the sequence began.
    """

    moves = True

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Another sequence begins."""
        self.length = self.before = self._layer = 0
        self._kept: list[tuple[Tensor, Tensor]] = []    # keys and values of each layer, [B, length, K, D]

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Those after the tokens before; asked for once in every forward pass."""
        self.before, self.length, self._layer = self.length, self.length + length, 0
        return torch.arange(self.before, self.length, device=device)

    def masks(self, length: int, documents: Tensor | None, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Of the first tokens; the last one looks at all."""
        return [] if self.before else super().masks(length, documents, device, dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor]) -> Tensor:
        """Of any number of first tokens, then of one by one; asked layer by layer."""
        if not self.before:
            self._kept.append((k, v))
            return super().attend(q, k, v, masks)
        assert q.shape[1] == 1, "after the first ones tokens come one by one"
        kept = self._kept[self._layer]
        self._kept[self._layer] = k, v = torch.cat((kept[0], k), 1), torch.cat((kept[1], v), 1)
        self._layer += 1
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
