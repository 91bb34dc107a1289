"""The two halves of a backward pass make the whole, to the last bit, and compute nothing twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpilm.model.gpt import GPT
from mpilm.model.shape import Shape
from mpilm.parallel.split import Halves

pytestmark = pytest.mark.serial
SHAPE = Shape(layers=3, width=32, heads=4, kv_heads=2, vocab_size=67)
TOKENS = torch.arange(2 * 17).view(2, 17) * 7 % 67


def graph(units, dtype):
    """(part of a model, its output, its input or None, the gradient that comes from behind)."""
    part = GPT(SHAPE, units)
    part.initialize(seed=1)
    part.to(dtype)
    draw = torch.Generator().manual_seed(1)
    hidden = None if part.first else torch.randn(2, 16, 32, generator=draw).to(dtype).requires_grad_()
    output = part(TOKENS[:, :-1], TOKENS[:, 1:], None, hidden)
    gradient = None if part.last else torch.randn(2, 16, 32, generator=draw).to(dtype)
    return part, output, hidden, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", [range(2), range(1, 4), range(3, 5), range(4, 5), range(5)])
def test_the_halves_are_the_whole(units, dtype):
    """Gradients of the input and of every parameter, for a first, a middle, and a last part, and for everything."""
    part, output, hidden, gradient = graph(units, dtype)
    torch.autograd.backward(output, gradient)
    again, output, leaf, gradient = graph(units, dtype)
    halves = Halves(output, leaf)
    of_input = halves.input_gradient(gradient)
    assert (of_input is None) is part.first
    assert part.first or torch.equal(of_input, hidden.grad)
    assert all(parameter.grad is None for parameter in again.parameters())
    halves.weight_gradients()
    for (name, one), other in zip(part.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


class Products(TorchDispatchMode):
    """Counts matrix products while it is entered."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        return function(*args, **kwargs or {})


def test_no_matrix_product_is_done_twice():
    """As many as in a whole backward pass; those of the four weights of each block in the second half."""
    _, output, _, gradient = graph(range(1, 4), torch.float32)
    with Products() as whole:
        torch.autograd.backward(output, gradient)
    _, output, leaf, gradient = graph(range(1, 4), torch.float32)
    halves = Halves(output, leaf)
    with Products() as first:
        halves.input_gradient(gradient)
    with Products() as second:
        halves.weight_gradients()
    assert second.count == 3 * 4
    assert first.count + second.count == whole.count


def test_a_weight_without_a_path_to_it_has_no_gradient():
    """An unused parameter stays without one, as in a whole backward pass."""
    used, unused = nn.Linear(4, 4), nn.Linear(4, 4)
    leaf = torch.ones(1, 4, requires_grad=True)
    halves = Halves(used(leaf).sum() + 0 * leaf.sum(), leaf)
    halves.input_gradient(None)
    halves.weight_gradients()
    assert used.weight.grad is not None and used.bias.grad is not None and unused.weight.grad is None
