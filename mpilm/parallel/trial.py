"""One micro-batch through a list of layers, before anything is built: what each makes of it, and what it costs.

    seen = look(layers, inputs)           # [Seen(shape=(4, 256), flops=1605632, draws=False, ...), ...]
    costs(layers, seen)                   # what `partition.cheapest` takes

It also finds what cannot be split over ranks without a change of its results, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mpilm.log import UserError
from mpilm.parallel.partition import FLOPS_A_GRADIENT


@dataclass(frozen=True)
class Seen:
    """What a layer did with a micro-batch.

    Args:
        shape: Of its output.
        dtype: Of its output.
        flops: Of its forward pass, matrix products and convolutions.
        draws: It drew random numbers, as dropout does.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    flops: int
    draws: bool


@torch.no_grad()
def look(layers: Sequence[nn.Module], inputs: Tensor) -> list[Seen]:
    """Run `inputs`, a micro-batch, through the layers, in training mode.

    Raises:
        UserError: A layer does not take what it gets, does not make a tensor, or keeps running statistics.
    """
    seen = []
    x = inputs.clone()
    with torch.random.fork_rng(devices=[]):
        for number, layer in enumerate(layers):
            x, flops, draws = _run(f"Layer {number} ({type(layer).__name__})", layer.train(), x)
            seen.append(Seen(tuple(x.shape), x.dtype, flops, draws))
    return seen


def _run(name: str, layer: nn.Module, x: Tensor) -> tuple[Tensor, int, bool]:
    given, state = tuple(x.shape), torch.get_rng_state()
    buffers = {key: value.clone() for key, value in layer.named_buffers()}
    try:
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
    except Exception as error:      # whatever the user's layer raises
        raise UserError(f"{name} fails on a micro-batch of shape {given}: {error}") from None
    if not isinstance(y, Tensor):
        raise UserError(f"{name} makes a {type(y).__name__}: a layer takes one tensor and makes one tensor.")
    if changed := [key for key, value in layer.named_buffers() if not _same(value, buffers.get(key))]:
        raise UserError(f"{name} changes its buffer {changed[0]} as it trains, which would come out differently on "
                        "every layout: use LayerNorm or GroupNorm, or track_running_stats=False.")
    return y, counter.get_total_flops(), not torch.equal(state, torch.get_rng_state())


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)


def costs(layers: Sequence[nn.Module], seen: Sequence[Seen]) -> list[float]:
    """What a micro-batch costs each layer, forward and backward, FLOPs or as long as they take.

    A backward pass is two forward passes; an activation or a gradient's element moves through memory.
    """
    return [float(3 * one.flops + FLOPS_A_GRADIENT * (_weights(layer) + torch.Size(one.shape).numel()))
            for layer, one in zip(layers, seen, strict=True)]


def _weights(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())
