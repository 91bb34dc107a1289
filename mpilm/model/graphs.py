"""CUDA graphs: a block's kernels are recorded once, and from then on launched together.

    played = record(blocks, x, places)
    y = played[0](x, places)            # as blocks[0](x, places), backward pass and all

The host launches a block's kernels one by one, and is too slow for those of small models: the GPU waits for it. A
recording plays them in one call. Everything it works on lies at fixed addresses: inputs are copied to its own, and its
output and the gradients that it gives are good until it is played again. Therefore

    one forward pass     of a block may be under way: its backward pass comes before the next one begins
    one shape            is played; others are computed as if there were no recording, and so is evaluation
    weights              stay where they are, as they do in flat buckets

Kernels are those of the block, compiled or not, so the bits are too. PyTorch's `make_graphed_callables` does the
recording (PyTorch manual, "CUDA semantics", "CUDA graphs").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.model.layers import Places


class Recording(nn.Module):
    """A module of its own, whose `forward` PyTorch replaces: the block, compiled or not, stays what it is."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, places: Places) -> Tensor:
        y: Tensor = self.block(x, places)
        return y


class Played:
    """What is called in place of a block: its recording, for x of the shape that was recorded, in training.

    Evaluation has no backward passes, and many forward ones under way.
    """

    def __init__(self, block: nn.Module, recording: Any, shape: torch.Size) -> None:
        self.block, self.recording, self.shape = block, recording, shape

    def __call__(self, x: Tensor, places: Places) -> Tensor:
        play = self.block.training and x.shape == self.shape
        y: Tensor = (self.recording if play else self.block)(x, places)
        return y


def record(blocks: Sequence[nn.Module], x: Tensor, places: Places) -> list[Played]:
    """Record all blocks of a part.

    Args:
        blocks: In the order of the forward pass, in training mode, their weights where they will stay.
        x: [B, T, C] on the GPU, of the dtype that the first block gets; its values do not matter.
        places: Of such tokens.
    """
    samples: Any = tuple((torch.zeros_like(x, requires_grad=True), places) for _ in blocks)
    recordings = torch.cuda.make_graphed_callables(tuple(map(Recording, blocks)), samples)
    return [Played(block, recording, x.shape) for block, recording in zip(blocks, recordings, strict=True)]
