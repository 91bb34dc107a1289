"""Layers: a run of somebody's list of layers, as one stage of a pipeline.

    chunk = Layers(layers, stages, 1, loss, seen, dtype=torch.float32)
    loss = chunk(inputs, targets, key, hidden)

Where the list is cut must not enter the arithmetic. So between two layers, whether they share a rank or not,
activations and their gradients are contiguous, as they come out of a message; and a layer that draws random numbers
(dropout) draws them by the key of the slot and its own place, not from a stream that runs through whatever a rank
happens to compute.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mpilm.model.recompute import again
from mpilm.parallel.trial import Seen, scalar

Loss = Callable[[Tensor, Tensor], Tensor]


class Layers(nn.Module):
    """One stage; it takes its layers over.

    Args:
        layers: Name -> layer, all layers of the model in order; each takes a tensor and makes a tensor.
        stages: How they are dealt to stages.
        stage: Which of them this is.
        loss: (output, target) -> mean over the micro-batch, a scalar.
        seen: What each layer makes of a micro-batch (see trial.py).
        loss_draws: The loss draws random numbers.
        dtype: Of weights and activations, and what floating-point inputs are made. The loss is computed in float32.
        recompute: Keep only a layer's input; run it again in the backward pass. Not of layers that have parameters in
            common: their gradients would come apart.
    """

    def __init__(self, layers: Mapping[str, nn.Module], stages: Sequence[range], stage: int, loss: Loss,
                 seen: Sequence[Seen], *, dtype: torch.dtype, loss_draws: bool = False,
                 recompute: bool = False) -> None:
        super().__init__()
        names, self.units = list(layers), stages[stage]
        self.layers = nn.ModuleDict({names[unit]: layers[names[unit]] for unit in self.units})
        self.losses = [loss]        # a module that is no attribute has no say in what this one's parameters are
        self.seen, self.dtype, self.loss_draws = seen, dtype, loss_draws
        self.recomputed = _with_own_parameters(layers) if recompute else set()
        self.shapes = [seen[units.start - 1].shape for units in stages]
        self.last = stage == len(stages) - 1

    def input_shape(self, stage: int, slot: Sequence[int]) -> tuple[int, ...]:
        """Of what enters pipeline stage `stage`, from 1."""
        return self.shapes[stage]

    def rows(self, slot: Sequence[int]) -> tuple[int, ...]:
        """Every layer sees what the one before it makes of the slot: see `linear_rows`."""
        return tuple(slot)

    def linear_rows(self) -> Mapping[nn.Linear, tuple[int, ...]]:
        """Those of its linear layers that are called once, by the list itself, with weights of their own, which nobody
        makes of others."""
        layers = list(self.layers.values())
        used = Counter(id(tensor) for _, tensor in self.layers.named_parameters(remove_duplicate=False))
        return {layer: self.seen[unit].shape[:-1] for unit, layer in zip(self.units, layers, strict=True)
                if type(layer) is nn.Linear and set(layer._parameters) == {"weight", "bias"}
                and all(tensor.requires_grad and used[id(tensor)] == 1 for tensor in layer.parameters())}

    def named_parameters(self, prefix: str = "", recurse: bool = True,
                         remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that are trained, under the names they have in the whole list."""
        for name, parameter in self.layers.named_parameters(prefix, recurse, remove_duplicate):
            if parameter.requires_grad:
                yield name, parameter

    def forward(self, inputs: Tensor, targets: Tensor | None = None, key: Tensor | None = None,
                hidden: Tensor | None = None) -> Tensor:
        """Loss, a float32 scalar, or activations; without targets the last stage makes the model's output.

        Args:
            inputs: A slot's inputs, [micro_batch_size, ...].
            targets: Its targets, [micro_batch_size, ...].
            key: int64 scalar, for random numbers; None: from wherever PyTorch takes them.
            hidden: From the stage before; None for the first.
        """
        # Copies: a layer may work in place, and NumPy's memory begins anywhere, which can enter the bits of a product.
        x = _copy(inputs, self.dtype) if hidden is None else hidden.clone()
        for unit, layer in zip(self.units, self.layers.values(), strict=True):
            x = _settled(self._layer(unit, layer, x, key))
        if self.last and targets is not None:
            with _drawing(key, len(self.seen), self.loss_draws):
                x = scalar(self.losses[0](x.float(), _copy(targets, torch.float32)))
        return x if x.requires_grad else x.requires_grad_()     # a stage with nothing to train goes backward too

    def _layer(self, unit: int, layer: nn.Module, x: Tensor, key: Tensor | None) -> Tensor:
        def run(x: Tensor) -> Tensor:
            with _drawing(key, unit, self.seen[unit].draws):
                y: Tensor = layer(x.clone() if unit in self.recomputed else x)
            return y

        return again(run, x) if unit in self.recomputed else run(x)


def _with_own_parameters(layers: Mapping[str, nn.Module]) -> set[int]:
    """Numbers of the layers no other layer has parameters of."""
    used = Counter(id(tensor) for layer in layers.values() for tensor in layer.parameters())
    return {number for number, layer in enumerate(layers.values())
            if all(used[id(tensor)] == 1 for tensor in layer.parameters())}


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True) if x.is_floating_point() else x.clone()


def _settled(x: Tensor) -> Tensor:
    x = x.contiguous()
    if x.requires_grad:
        x.register_hook(torch.Tensor.contiguous)
    return x


@contextmanager
def _drawing(key: Tensor | None, unit: int, draws: bool) -> Iterator[None]:
    """In such a block, what `draws` draws by the slot's key and its own number."""
    keyed = key is not None and draws
    with torch.random.fork_rng(devices=[], enabled=keyed):
        if keyed:
            torch.default_generator.manual_seed(_seed(key, unit))
        yield


def _seed(key: Tensor | None, unit: int) -> int:
    """PyTorch's CPU generator takes 32 bits of it."""
    text = f"{None if key is None else int(key)}:{unit}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
