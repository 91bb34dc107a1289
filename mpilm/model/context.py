"""What a rank has of a sequence: which tokens, where they stand, how they attend; here, a rank that has all of them.

The model asks this of its context and does not know whether ranks share the sequence. `Whole` has every token, in
order; `cache.py` has a sequence that grows. `parallel/context.py` has the ring, whose ranks have T / size tokens each;
attention is the only layer of the model that looks at other tokens than its own, so it is the only one that differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpilm.model import attention


class Whole:
    """A rank that has whole sequences.

    Attributes:
        size: Ranks that share a sequence.
        ledgers: Messages between them.
        moves: My tokens stand somewhere else in every call.
    """

    size = 1
    moves = False
    ledgers: tuple[Any, ...] = ()

    def share(self, x: Tensor) -> Tensor:
        """My tokens, [B, T / size], of [B, T]."""
        return x

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Where my tokens stand in a sequence of `length` tokens: [length / size] int64."""
        return torch.arange(length, device=device)

    def masks(self, length: int, documents: Tensor | None, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """What `attend` must know of `documents` [B, T], integers, of a sequence of `length` tokens; queries are of
        `dtype`."""
        return attention.masks(length, documents, device, dtype)

    def compiled(self) -> None:
        """Compiled code is going to call `attend`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor]) -> Tensor:
        """Causal attention of my queries [B, T / size, H, D], divided by sqrt(D), over all tokens' keys and values, of
        which mine are [B, T / size, K, D]; weighted values [B, T / size, H, D]."""
        return attention.attend(q, k, v, masks)


WHOLE = Whole()
