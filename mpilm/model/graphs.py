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

Autograd keeps, for a weight, the node that takes its gradient for as long as any graph has it, and calls the weight's
hooks on the stream on which that node was made. Nodes of a recording were made on its streams, and whoever takes
gradients by such a hook would do so apart from the events that order everything else. So a recording keeps no graph.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.model.layers import Places


class Recording(nn.Module):
    """A module of its own, whose `forward` PyTorch replaces: the block, compiled or not, stays what it is."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.y: Tensor | None = None

    def forward(self, x: Tensor, places: Places) -> Tensor:
        self.forget()
        self.y = y = self.block(x, places)
        return y

    def forget(self) -> None:
        """Drop the graph of the last pass, which the recorder holds on to."""
        if self.y is not None:
            self.y.detach_()


class Played:
    """What is called in place of a block: its recording, for x and places like those of the recording, in training.

    Evaluation has no backward passes, and many forward ones under way.
    """

    def __init__(self, block: nn.Module, recording: Any, x: Tensor, places: Places) -> None:
        self.block, self.recording, self.like = block, recording, _like(x, places)

    def __call__(self, x: Tensor, places: Places) -> Tensor:
        play = self.block.training and _like(x, places) == self.like
        y: Tensor = (self.recording if play else self.block)(x, places)
        return y


def _like(x: Tensor, places: Places) -> tuple[torch.Size, list[torch.Size]]:
    return x.shape, [mask.shape for mask in places.masks]


def record(blocks: Sequence[nn.Module], x: Tensor, places: Places) -> list[Played]:
    """Record all blocks of a part. No other thread may use the GPU meanwhile.

    Args:
        blocks: In the order of the forward pass, in training mode, their weights where they will stay.
        x: [B, T, C] on the GPU, of the dtype that the first block gets; its values do not matter.
        places: Of such tokens.
    """
    samples: Any = tuple((torch.zeros_like(x, requires_grad=True), places) for _ in blocks)
    modules = tuple(map(Recording, blocks))
    with _nothing_collected():
        recordings = torch.cuda.make_graphed_callables(modules, samples)
    for module in modules:
        module.forget()
    return [Played(block, recording, x, places) for block, recording in zip(blocks, recordings, strict=True)]


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Memory of a GPU that is given back spoils what is being recorded; so garbage goes before, or waits."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
