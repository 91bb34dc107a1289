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

A block that is computed again in its backward pass (model/recompute.py) has a graph of its own, of which the outer one
knows nothing; what is found there on the way is taken like the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.log import UserError
from mpilm.model import recompute
from mpilm.model.products import KINDS, Plain, weight_gradient
from mpilm.model.seed import seed

Rows = tuple[int, ...]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, x_tap: Tensor, dy_tap: Tensor,
                products: type[Plain]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products = products
        return products.outputs(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy, = gradients
        x, weight = ctx.saved_tensors
        return ctx.products.inputs(dy, weight), None, None, x, dy, None


class Linear(nn.Linear):
    """A linear layer whose weights' gradients are left to whoever takes the gradients of its taps."""

    x_tap: Tensor
    dy_tap: Tensor
    products: type[Plain]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Linear.apply(x, self.weight, self.bias, self.x_tap, self.dy_tap, self.products)
        return y


class Deferred:
    """The linear layers of `part`, and backward passes through it in two halves.

    Args:
        part: A module; its parameters are those that `named_parameters` tells.
        own: The layers to put off, each called once in a forward pass, with the rows that each sees; None: every linear
            layer without bias, which sees the rows of the micro-batch, and whose weight is used nowhere else.
    """

    def __init__(self, part: Any, own: Mapping[nn.Linear, Rows] | None = None) -> None:
        self.own = own or {}
        self.layers: list[Linear] = []
        chosen = own if own is not None else [module for module in part.modules()
                                              if type(module) in KINDS and module.bias is None]
        self.kinds: list[Any] = [type(module) for module in chosen]
        for module in chosen:
            products, module.__class__ = KINDS[type(module)], Linear
            assert isinstance(module, Linear)
            module.products = products
            self.layers.append(module)
        late = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        named = dict(part.named_parameters())
        if hooked := [name for name, parameter in named.items() if parameter._backward_hooks]:
            raise UserError(f"{hooked[0]} has a hook for its gradient, which a backward pass in two halves would call "
                            "twice: give another --parallel.schedule than zb.")
        self.late = {name for name, parameter in named.items() if id(parameter) in late}
        self.early = {name: parameter for name, parameter in named.items() if name not in self.late}
        self.watched = [layer.weight for layer in self.layers] if own else []
        self.rows: Rows = ()
        self.taps: list[Tensor] = []

    def undo(self) -> None:
        """The layers are again what they were."""
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            layer.__class__ = kind
            for name in ("products", "x_tap", "dy_tap"):
                layer.__dict__.pop(name, None)

    def prepare(self, rows: Rows) -> None:
        """Before a forward pass over micro-batches of so many rows, such as (sequences, tokens)."""
        if rows == self.rows:
            return
        self.rows, self.taps = rows, []
        for layer in self.layers:
            layer.x_tap, layer.dy_tap = (
                layer.weight.new_empty(()).expand(*self.own.get(layer, rows), width).requires_grad_()
                for width in (layer.in_features, layer.out_features))
            self.taps += [layer.x_tap, layer.dy_tap]

    def backward(self, output: Tensor, gradient: Tensor | None, hidden: Tensor | None) -> Half:
        """Everything but the linear layers' weights. Gradients go where the parameters' hooks take them."""
        operands: list[Tensor | None] = [None] * len(self.taps)

        def through(output: Tensor, hidden: Tensor | None, gradient: Tensor | None) -> Tensor | None:
            leaves = [*([hidden] if hidden is not None else []), *self.early.values(), *self.taps, *self.watched]
            found: list[Tensor | None] = []
            if leaves:
                found += torch.autograd.grad(seed(output, gradient), leaves, allow_unused=True)
            dx = found.pop(0) if hidden is not None else None
            for parameter in self.early.values():
                _deliver(parameter, found.pop(0))
            while len(found) > len(self.taps):
                _require_none(found.pop())
            operands[:] = [new if old is None else old for old, new in zip(operands, found, strict=True)]
            return dx

        with recompute.by(through):
            return Half(self.layers, operands, through(output, hidden, gradient))


class Half:
    """What the first half of a backward pass has left to do; `input_gradient` is that of the part's input."""

    def __init__(self, layers: list[Linear], operands: list[Tensor | None], input_gradient: Tensor | None) -> None:
        self.layers, self.operands, self.input_gradient = layers, operands, input_gradient

    def weights(self) -> None:
        """The gradients of the linear layers' weights, from the output towards the input."""
        for layer in reversed(self.layers):
            dy, x = self.operands.pop(), self.operands.pop()
            if x is not None and dy is not None:
                _deliver(layer.weight, weight_gradient(x, dy))
                if layer.bias is not None:
                    _deliver(layer.bias, dy.flatten(0, -2).sum(0))


def _require_none(gradient: Tensor | None) -> None:
    if gradient is not None:
        raise UserError("The weight of a linear layer is used outside of the layer too, so that its gradient can't be "
                        "computed apart: give another --parallel.schedule than zb.")


def _deliver(parameter: Tensor, gradient: Tensor | None) -> None:
    """Accumulate a gradient into a parameter, hooks and all."""
    if gradient is not None:
        torch.autograd.backward(seed(parameter, gradient))
