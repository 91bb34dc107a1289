"""One micro-batch through a list of layers, before anything is built: what each makes of it, and what it costs.

    seen, output = look(layers, inputs)     # [Seen(shape=(4, 256), flops=1605632, draws=False, ...), ...]
    costs(layers, seen)                     # what `partition.cheapest` takes
    draws(loss, output, targets)            # False

It also finds what cannot be split over ranks without a change of its results, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mpilm.log import UserError
from mpilm.parallel.partition import FLOPS_A_GRADIENT

DROPOUT = (nn.modules.dropout._DropoutNd, nn.RReLU)


@dataclass(frozen=True)
class Seen:
    """What a layer did with a micro-batch.

    Args:
        shape: Of its output.
        dtype: Of its output.
        flops: Of its forward pass, matrix products and convolutions.
        draws: It drew random numbers, or is dropout, which may come to it later.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    flops: int
    draws: bool


@torch.no_grad()
def look(layers: Sequence[nn.Module], inputs: Tensor) -> tuple[list[Seen], Tensor]:
    """Run `inputs`, a micro-batch, through the layers, in training mode; also gives the output of the last.

    Raises:
        UserError: A layer does not take what it gets, does not make a tensor, or keeps running statistics.
    """
    seen = []
    x = inputs.clone()
    with torch.random.fork_rng(devices=[]):
        for number, layer in enumerate(layers):
            x, flops, drew = _run(f"Layer {number} ({type(layer).__name__})", layer.train(), x)
            seen.append(Seen(tuple(x.shape), x.dtype, flops, drew or _may_draw(layer)))
    return seen, x


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
                        "every layout: use LayerNorm or GroupNorm.")
    return y, counter.get_total_flops(), not torch.equal(state, torch.get_rng_state())


def _may_draw(layer: nn.Module) -> bool:
    """Dropout with a share of 0 draws nothing, until somebody raises it."""
    return any(isinstance(module, DROPOUT) for module in layer.modules())


def draws(loss: Callable[[Tensor, Tensor], Tensor], output: Tensor, targets: Tensor) -> bool:
    """Compute the loss of a micro-batch; whether it draws random numbers.

    Raises:
        UserError: It fails, makes no scalar tensor, or nothing can be learned by it.
    """
    if isinstance(loss, nn.Module) and any(parameter.requires_grad for parameter in loss.parameters()):
        raise UserError("The loss has parameters, which nobody would train: make them part of a layer, or freeze them.")
    leaf = output.detach().float().requires_grad_()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        state = torch.get_rng_state()
        try:
            found = loss(leaf, targets)
        except Exception as error:      # whatever the user's loss raises
            raise UserError(f"The loss fails on outputs {tuple(output.shape)} and targets {tuple(targets.shape)} of "
                            f"{targets.dtype}: {error}") from None
        if not scalar(found).requires_grad:
            raise UserError("The loss has no gradient (it was made by .item(), .detach(), argmax or a comparison, "
                            "say): nothing can be learned by it.")
        return not torch.equal(state, torch.get_rng_state())


def scalar(loss: object) -> Tensor:
    """What a loss makes.

    Raises:
        UserError: It is something else.
    """
    if not isinstance(loss, Tensor):
        raise UserError(f"The loss is a {type(loss).__name__}: it must be a tensor, the mean over the micro-batch.")
    if loss.dim():
        raise UserError(f"The loss is a tensor of shape {tuple(loss.shape)}: it must be a scalar, the mean over the "
                        "micro-batch.")
    return loss


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
