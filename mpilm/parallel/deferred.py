"""Linear layers whose weight gradients are computed later: the second half of a zero-bubble backward pass.

    deferred = Deferred(part)                               once; its nn.Linear layers are changed
    deferred.prepare(rows)                                  before a forward pass
    half = deferred.backward(output, gradient, hidden)      gradients of the input, norms, embedding, at once
    half.weights()                                          those of the linear layers, when there is nothing else to do

A third of a block's backward pass is products dy^T x that nobody but the optimizer waits for (arXiv 2401.10241). A
layer's backward pass leaves them out, and hands out x and dy instead, as the "gradients" of two taps: leaf tensors of
their shapes, without memory of their own, which the layer takes as inputs and does not look at. So x and dy are results
of the backward pass like any other, for a compiler too, and compiled code can be split without knowing about it. The
product is the one that autograd makes, with the same operands in the same order: the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, x_tap: Tensor, dy_tap: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy, = gradients
        x, weight = ctx.saved_tensors
        return dy @ weight, None, x, dy


class Linear(nn.Linear):
    """A linear layer without bias whose weight gradient is left to whoever takes the gradients of its taps."""

    x_tap: Tensor
    dy_tap: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Linear.apply(x, self.weight, self.x_tap, self.dy_tap)
        return y


class Deferred:
    """The linear layers of `part`, and backward passes through it in two halves."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part
        self.layers: list[Linear] = []
        for module in part.modules():
            if type(module) is nn.Linear and module.bias is None:
                module.__class__ = Linear
                assert isinstance(module, Linear)
                self.layers.append(module)
        late = {id(layer.weight) for layer in self.layers}
        named = dict(part.named_parameters())
        self.late = {name for name, parameter in named.items() if id(parameter) in late}
        self.early = {name: parameter for name, parameter in named.items() if name not in self.late}
        self.rows: tuple[int, ...] = ()
        self.taps: list[Tensor] = []

    def prepare(self, rows: tuple[int, ...]) -> None:
        """Before a forward pass over micro-batches of so many rows, such as (sequences, tokens)."""
        if rows == self.rows:
            return
        self.rows, self.taps = rows, []
        for layer in self.layers:
            layer.x_tap, layer.dy_tap = (
                torch.empty((), dtype=layer.weight.dtype).expand(*rows, width).requires_grad_()
                for width in (layer.in_features, layer.out_features))
            self.taps += [layer.x_tap, layer.dy_tap]

    def backward(self, output: Tensor, gradient: Tensor | None, hidden: Tensor | None) -> Half:
        """Everything but the linear layers' weights. Gradients go where the parameters' hooks take them."""
        leaves = [*([hidden] if hidden is not None else []), *self.early.values(), *self.taps]
        found: list[Tensor | None] = list(torch.autograd.grad(output, leaves, gradient, allow_unused=True))
        dx = found.pop(0) if hidden is not None else None
        for parameter in self.early.values():
            _deliver(parameter, found.pop(0))
        return Half(self.layers, found, dx)


class Half:
    """What the first half of a backward pass has left to do; `input_gradient` is that of the part's input."""

    def __init__(self, layers: list[Linear], operands: list[Tensor | None], input_gradient: Tensor | None) -> None:
        self.layers, self.operands, self.input_gradient = layers, operands, input_gradient

    def weights(self) -> None:
        """The gradients of the linear layers' weights, from the output towards the input."""
        for layer in reversed(self.layers):
            dy, x = self.operands.pop(), self.operands.pop()
            if x is not None and dy is not None:
                _deliver(layer.weight, product(x, dy))


def product(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient [out, in] of a weight, as autograd computes it."""
    return (x.flatten(0, -2).t() @ dy.flatten(0, -2)).t()


def _deliver(parameter: Tensor, gradient: Tensor | None) -> None:
    """Accumulate a gradient into a parameter, hooks and all."""
    if gradient is not None:
        torch.autograd.backward(parameter.view_as(parameter), gradient)
