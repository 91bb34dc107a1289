"""A sign for every value, and for every block of 1,024 the means of what is positive and of what is not.

It is only of use with error feedback (1-bit SGD, Seide et al., Interspeech 2014).

    chunk:   | two means a block, float32 | signs, 8 in a byte |
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mpilm.sync.compress._base import Codec

BLOCK = 1024


class Onebit(Codec):
    """1 bit a value and 8 bytes for every 1,024."""

    def chunk_size(self, count: int) -> int:
        """As Codec."""
        return 8 * -(-count // BLOCK) + -(-count // 32) * 4

    def encode_chunk(self, values: Tensor, data: Tensor) -> None:
        """As Codec."""
        means, signs = _split(data, values.numel())
        blocks = _blocks(values)
        above = blocks > 0
        num_above = above.sum(1)
        num_below = torch.clamp(_lengths(values.numel()) - num_above, min=1)
        positive = blocks.clamp(min=0).sum(1)
        means[:, 0] = positive / num_above.clamp(min=1)
        means[:, 1] = (blocks.sum(1) - positive) / num_below
        packed = np.packbits(above.view(-1)[:values.numel()].numpy())
        signs.numpy()[:packed.size] = packed

    def decode_chunk(self, data: Tensor, values: Tensor) -> None:
        """As Codec."""
        means, signs = _split(data, values.numel())
        above = _blocks(torch.from_numpy(np.unpackbits(signs.numpy(), count=values.numel())))
        step = means[:, :1] - means[:, 1:]
        values.copy_(torch.mul(above, step).add_(means[:, 1:]).view(-1)[:values.numel()])


def _split(data: Tensor, count: int) -> tuple[Tensor, Tensor]:
    cut = 8 * -(-count // BLOCK)
    return data[:cut].view(torch.float32).view(-1, 2), data[cut:]


def _blocks(values: Tensor) -> Tensor:
    """[blocks, BLOCK]; the last one filled up with zeros."""
    missing = -values.numel() % BLOCK
    return (torch.cat((values, values.new_zeros(missing))) if missing else values).view(-1, BLOCK)


def _lengths(count: int) -> Tensor:
    """Values of every block."""
    blocks = -(-count // BLOCK)
    return torch.tensor([BLOCK] * (blocks - 1) + [count - (blocks - 1) * BLOCK])
