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
        num_below = torch.clamp(_lengths(values.numel(), values.device) - num_above, min=1)
        positive = blocks.clamp(min=0).sum(1)
        means[:, 0] = positive / num_above.clamp(min=1)
        means[:, 1] = (blocks.sum(1) - positive) / num_below
        packed = pack(above.view(-1))[:-(-values.numel() // 8)]
        signs[:len(packed)] = packed

    def decode_chunk(self, data: Tensor, values: Tensor) -> None:
        """As Codec."""
        means, signs = _split(data, values.numel())
        above = _blocks(unpack(signs)[:values.numel()])
        step = means[:, :1] - means[:, 1:]
        values.copy_(torch.mul(above, step).add_(means[:, 1:]).view(-1)[:values.numel()])


def _split(data: Tensor, count: int) -> tuple[Tensor, Tensor]:
    cut = 8 * -(-count // BLOCK)
    return data[:cut].view(torch.float32).view(-1, 2), data[cut:]


def _blocks(values: Tensor) -> Tensor:
    """[blocks, BLOCK]; the last one filled up with zeros."""
    missing = -values.numel() % BLOCK
    return (torch.cat((values, values.new_zeros(missing))) if missing else values).view(-1, BLOCK)


def _lengths(count: int, device: torch.device) -> Tensor:
    """Values of every block."""
    blocks = -(-count // BLOCK)
    return torch.tensor([BLOCK] * (blocks - 1) + [count - (blocks - 1) * BLOCK], device=device)


def pack(bits: Tensor) -> Tensor:
    """Booleans, a multiple of 8, as bytes, the first in the highest place. NumPy is the quickest where it can."""
    return torch.from_numpy(np.packbits(bits.numpy())) if bits.device.type == "cpu" else pack_anywhere(bits)


def unpack(packed: Tensor) -> Tensor:
    """The inverse: 0 and 1, uint8."""
    return torch.from_numpy(np.unpackbits(packed.numpy())) if packed.device.type == "cpu" else unpack_anywhere(packed)


def pack_anywhere(bits: Tensor) -> Tensor:
    """As `pack`, on any device."""
    return (bits.view(-1, 8).to(torch.uint8) << _places(bits)).sum(1, dtype=torch.uint8)


def unpack_anywhere(packed: Tensor) -> Tensor:
    """As `unpack`, on any device."""
    return (packed[:, None] >> _places(packed) & 1).view(-1)


def _places(like: Tensor) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=like.device)
