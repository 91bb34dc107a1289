"""No compression: the values themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from mpilm.sync.compress._base import Codec


class Float32(Codec):
    """4 bytes a value, exact."""

    def chunk_size(self, count: int) -> int:
        """As Codec."""
        return 4 * count

    def encode_chunk(self, values: Tensor, data: Tensor) -> None:
        """As Codec."""
        data.copy_(values.view(torch.uint8))

    def decode_chunk(self, data: Tensor, values: Tensor) -> None:
        """As Codec."""
        values.view(torch.uint8).copy_(data)
