"""Whole numbers from -127 to 127 times a scale for every block of 256 values: about 1 byte a value.

The scale is the largest magnitude of the block over 127, so the error of a value is at most half a scale: 1/254 of the
largest value beside it (block-wise quantization, arXiv 2110.02861). A block that has nothing above a 1,000th of the
largest magnitude of its chunk is empty: with one scale for all that would be a quarter of a level. Error feedback sends
it when it has grown. Of an embedding, few rows of which were read, that is most blocks, and zstd finds them
(`_parcels.py`).

    chunk:   | scales, float32 | levels, int8 |
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpilm.sync.compress._base import Codec

BLOCK = 256
LEVELS = 127
LEAST = 1e-3    # of the chunk's largest magnitude


class Int8(Codec):
    """1 byte a value and 4 for every 256."""

    def chunk_size(self, count: int) -> int:
        """As Codec."""
        # Levels are padded to a multiple of 4, so that the next chunk's scales begin where a float32 may.
        return 4 * -(-count // BLOCK) + -(-count // 4) * 4

    def encode_chunk(self, values: Tensor, data: Tensor) -> None:
        """As Codec."""
        scales, levels = _split(data, values.numel())
        runs = _runs(values, scales, levels)
        for blocks, scale, _ in runs:   # magnitudes are in the order of their bits, whose largest is found sooner
            torch.amax(blocks.abs().view(torch.int32), 1, out=scale.view(torch.int32))
        scales.mul_(scales >= LEAST * scales.max()).div_(LEVELS)
        for blocks, scale, level in runs:
            # An empty block has scale 0, and 0 x 0 is as good as 0 x infinity is bad.
            inverse = scale.reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0)
            level.copy_(torch.mul(blocks, inverse[:, None]).round_())

    def decode_chunk(self, data: Tensor, values: Tensor) -> None:
        """As Codec."""
        scales, levels = _split(data, values.numel())
        for blocks, scale, level in _runs(values, scales, levels):
            blocks.copy_(level).mul_(scale[:, None])    # a product of both types takes twice as long


def _split(data: Tensor, count: int) -> tuple[Tensor, Tensor]:
    cut = 4 * -(-count // BLOCK)
    return data[:cut].view(torch.float32), data[cut:cut + count].view(torch.int8)


def _runs(values: Tensor, scales: Tensor, levels: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The whole blocks together, then what is left of a last one; each [blocks, elements]."""
    whole = values.numel() // BLOCK
    cuts = [(0, whole, BLOCK), (whole, whole + 1, values.numel() - whole * BLOCK)]
    return [(values[a * BLOCK:a * BLOCK + (b - a) * width].view(b - a, width), scales[a:b],
             levels[a * BLOCK:a * BLOCK + (b - a) * width].view(b - a, width))
            for a, b, width in cuts if (b - a) * width]
