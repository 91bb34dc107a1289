"""The largest hundredth of the values of every chunk, exactly, each with its place: 6 bytes for 100 values.

Everything else waits in the residual until it is large enough (sparsified SGD with memory, arXiv 1809.07599).

    chunk:   | values, float32 | places in the chunk, uint16 |
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpilm.sync.compress._base import Codec

DENSITY = 0.01


class Topk(Codec):
    """6 bytes for every value that is sent."""

    def chunk_size(self, count: int) -> int:
        """As Codec."""
        return 6 * _kept(count) + 2 * (_kept(count) % 2)   # padded: the next chunk begins where a float32 may

    def encode_chunk(self, values: Tensor, data: Tensor) -> None:
        """As Codec."""
        kept, places = _split(data, values.numel())
        chosen = values.abs().topk(len(kept), sorted=False).indices
        kept.copy_(values[chosen])
        places.copy_(chosen)

    def decode_chunk(self, data: Tensor, values: Tensor) -> None:
        """As Codec."""
        kept, places = _split(data, values.numel())
        values.zero_()
        values[places.long()] = kept


def _kept(count: int) -> int:
    return -int(-count * DENSITY // 1) if count else 0


def _split(data: Tensor, count: int) -> tuple[Tensor, Tensor]:
    kept = _kept(count)
    return data[:4 * kept].view(torch.float32), data[4 * kept:6 * kept].view(torch.uint16)
