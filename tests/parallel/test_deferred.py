"""The two halves of a backward pass make the whole, to the last bit, and compute nothing twice.

Compiled parts: test_pipeline.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpilm.log import UserError
from mpilm.model.gpt import GPT
from mpilm.model.shape import Shape
from mpilm.parallel.deferred import Deferred

pytestmark = pytest.mark.serial
SHAPE = Shape(layers=3, width=32, heads=4, kv_heads=2, vocab_size=67)
TOKENS = torch.arange(2 * 17).view(2, 17) * 7 % 67


def graph(units, dtype, *, late=False):
    """(part of a model, its halves, its output, its input or None, the gradient that comes from behind)."""
    part = GPT(SHAPE, units)
    part.initialize(seed=1)
    part.to(dtype)
    halves = Deferred(part) if late else None
    if halves:
        halves.prepare((2, 16))
    draw = torch.Generator().manual_seed(1)
    hidden = None if part.first else torch.randn(2, 16, 32, generator=draw).to(dtype).requires_grad_()
    output = part(TOKENS[:, :-1], TOKENS[:, 1:], None, hidden)
    gradient = None if part.last else torch.randn(2, 16, 32, generator=draw).to(dtype)
    return part, halves, output, hidden, gradient


PARTS = [range(2), range(1, 4), range(3, 5), range(4, 5), range(5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", PARTS)
def test_the_halves_are_the_whole(units, dtype):
    """Gradients of the input and of every parameter, for a first, a middle, and a last part, and for everything."""
    part, _, output, hidden, gradient = graph(units, dtype)
    torch.autograd.backward(output, gradient)
    again, halves, output, leaf, gradient = graph(units, dtype, late=True)
    half = halves.backward(output, gradient, leaf)
    assert (half.input_gradient is None) is part.first
    assert part.first or torch.equal(half.input_gradient, hidden.grad)
    assert {name for name, parameter in again.named_parameters() if parameter.grad is None} == halves.late
    half.weights()
    for (name, one), other in zip(part.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_passes_under_way_at_the_same_time_do_not_mix():
    """Two forward passes before their backward passes, whose second halves come last."""
    part, halves, output, leaf, gradient = graph(range(1, 4), torch.float32, late=True)
    other_leaf = (2 * leaf.detach()).requires_grad_()
    other = part(TOKENS[:, :-1], None, None, other_leaf)
    pending = [halves.backward(output, gradient, leaf), halves.backward(other, gradient, other_leaf)]
    for half in pending:
        half.weights()
    again, _, output, leaf, gradient = graph(range(1, 4), torch.float32)
    torch.autograd.backward(output, gradient)
    torch.autograd.backward(again(TOKENS[:, :-1], None, None, (2 * leaf.detach()).requires_grad_()), gradient)
    for (name, one), same in zip(part.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, same.grad), name


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
    _, _, output, _, gradient = graph(range(1, 4), torch.float32)
    with Products() as whole:
        torch.autograd.backward(output, gradient)
    _, halves, output, leaf, gradient = graph(range(1, 4), torch.float32, late=True)
    with Products() as first:
        half = halves.backward(output, gradient, leaf)
    with Products() as second:
        half.weights()
    assert second.count == 3 * 4
    assert first.count + second.count == whole.count


def test_a_weight_without_a_path_to_it_has_no_gradient():
    """An unused parameter stays without one, as in a whole backward pass; a layer with a bias is not put off."""
    layers = nn.ModuleDict({"used": nn.Linear(4, 4, bias=False), "biased": nn.Linear(4, 4), "unused": nn.Linear(4, 4),
                            "idle": nn.Linear(4, 4, bias=False)})
    halves, leaf = Deferred(layers), torch.ones(1, 4, requires_grad=True)
    halves.prepare((1,))
    half = halves.backward(layers["biased"](layers["used"](leaf)).sum(), None, leaf)
    half.weights()
    found = {name for name, parameter in layers.named_parameters() if parameter.grad is not None}
    assert found == {"used.weight", "biased.weight", "biased.bias"}
    assert halves.late == {"used.weight", "idle.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(6,), (2, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_are_named_are_put_off(rows, bias, dtype):
    """With rows of their own, with a bias or without, wide or narrow: the same bits as autograd's."""
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(24, 70, bias=bias), nn.Tanh(), nn.Linear(70, 3, bias=bias)).to(dtype)
    leaf = torch.randn(*rows, 24).to(dtype).requires_grad_()
    layers(leaf).square().sum().backward()
    expected = [parameter.grad for parameter in layers.parameters()]
    of_input, leaf.grad = leaf.grad, None
    layers.zero_grad()
    halves = Deferred(layers, {layers[0]: rows, layers[2]: rows})
    halves.prepare((1,))
    half = halves.backward(layers(leaf).square().sum(), None, leaf)
    assert torch.equal(half.input_gradient, of_input) and all(p.grad is None for p in layers.parameters())
    half.weights()
    assert all(torch.equal(one, other.grad) for one, other in zip(expected, layers.parameters(), strict=True))


@pytest.mark.parametrize("sparse", [True, False])
def test_what_is_not_put_off_may_be_sparse(sparse):
    """An embedding's rows come at once, as they are, to whoever waits for them."""
    torch.manual_seed(2)
    layers = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 3, bias=False))
    tokens, got = torch.tensor([[1, 5, 1]]), []
    layers(tokens).square().sum().backward()
    expected = [parameter.grad for parameter in layers.parameters()]
    layers.zero_grad()
    layers[0].weight.register_post_accumulate_grad_hook(lambda weight: got.append(weight.grad))
    halves = Deferred(layers)
    halves.prepare(tuple(tokens.shape))
    half = halves.backward(layers(tokens).square().sum(), None, None)
    assert [gradient.is_sparse for gradient in got] == [sparse]
    assert torch.equal(got[0].to_dense(), expected[0].to_dense())
    half.weights()
    assert torch.equal(layers[1].weight.grad, expected[1])


def test_a_weight_that_is_used_elsewhere_too_is_refused():
    """Half of its gradient would be missing."""
    layer, leaf = nn.Linear(4, 4), torch.ones(1, 4, requires_grad=True)
    halves = Deferred(layer, {layer: (1,)})
    halves.prepare((1,))
    with pytest.raises(UserError, match="used outside of the layer"):
        halves.backward(layer(leaf).sum() + layer.weight.square().sum(), None, leaf)
