"""Activation checkpointing: keep only a block's input in the forward pass, and compute it again in the backward pass.

    x = again(block, x, places)         # as block(x, places), the same bits, without what the block would keep

    forward     x -> block -> y         what the block kept for its backward pass is dropped at once
    backward    x -> block -> y         computed again, by the very code of the first time, and then backward through it
                dx <- block <- dy       the gradients of weights accumulate on the way, hooks and all

Memory for a block's activations is needed for one block at a time; the forward pass is done twice. Both times it
records a graph, so that compiled blocks run the same code. (Training deep nets with sublinear memory cost: arXiv
1604.06174.)

How the backward pass goes through the block's graph, (y, x, dy) -> dx, is a `Pass`. Whoever splits backward passes has
its own, for as long as its first half takes (parallel/deferred.py): `with by(through): ...`. It holds for all threads,
because backward passes of a GPU have one of their own, which knows nothing of the context of the one that began them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mpilm.model.seed import seed

Block = Callable[..., Tensor]
Pass = Callable[[Tensor, Tensor, Tensor], Tensor | None]


def whole(output: Tensor, hidden: Tensor, gradient: Tensor) -> Tensor | None:
    """A whole backward pass: gradients of weights are accumulated, that of the leaf `hidden` is returned."""
    torch.autograd.backward(seed(output, gradient))
    return hidden.grad


_ways: list[Pass] = [whole]     # the innermost last


@contextmanager
def by(way: Pass) -> Iterator[None]:
    """In such a block, backward passes go through blocks' graphs so."""
    _ways.append(way)
    try:
        yield
    finally:
        _ways.pop()


def again(block: Block, x: Tensor, *args: Any) -> Tensor:
    """block(x, *args), a tensor; the backward pass computes it once more. `args` get no gradients.

    Where `x` needs no gradient (inputs of a model), the block is run as it is: its backward pass could not be called.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return block(x, *args)
    y: Tensor = _Again.apply(x, block, args)
    return y


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, args: tuple[Any, ...]) -> Tensor:
        ctx.block, ctx.args = block, args
        ctx.save_for_backward(x)
        return _graph(block, x, args)[0].detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, = ctx.saved_tensors
        output, leaf = _graph(ctx.block, x, ctx.args)
        return _ways[-1](output, leaf, gradients[0]), None, None


def _graph(block: Block, x: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """(output, leaf that it was computed from)."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        return block(leaf, *args), leaf
