"""The upper half of every float32, rounded to nearest: 2 bytes a value, a relative error of at most 2^-8."""

from __future__ import annotations

import torch
from torch import Tensor

from mpilm.sync.compress._base import Codec


class Bf16(Codec):
    """2 bytes a value."""

    def chunk_size(self, count: int) -> int:
        """As Codec."""
        return 2 * count

    def encode_chunk(self, values: Tensor, data: Tensor) -> None:
        """As Codec."""
        # A chunk may begin at any byte of a message, and bfloat16 wants an even one: every size here is even.
        data.view(torch.bfloat16).copy_(values)

    def decode_chunk(self, data: Tensor, values: Tensor) -> None:
        """As Codec."""
        values.copy_(data.view(torch.bfloat16))
