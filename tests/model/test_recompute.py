"""Blocks that are computed again: the same bits, and less that is kept. Compiled ones: parallel/test_pipeline.py."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from mpilm.model.gpt import GPT
from mpilm.model.recompute import again
from mpilm.model.shape import Shape
from mpilm.parallel.deferred import Deferred

pytestmark = pytest.mark.serial
BATCH, LENGTH, WIDTH = 2, 16, 32
TOKENS = torch.arange(BATCH * (LENGTH + 1)).view(BATCH, -1) * 7 % 67


def part(layers=3, units=None, dtype=torch.float32, *, recompute):
    """A model or a part of one, with initial weights."""
    model = GPT(Shape(layers=layers, width=WIDTH, heads=4, kv_heads=2, vocab_size=67), units)
    model.initialize(seed=1)
    model.recompute = recompute
    return model.to(dtype)


def forward(model, dtype=torch.float32):
    """(output, input or None, gradient of the output or None)."""
    draw = torch.Generator().manual_seed(1)
    hidden, gradient = (torch.randn(BATCH, LENGTH, WIDTH, generator=draw).to(dtype) for _ in range(2))
    leaf = None if model.first else hidden.requires_grad_()
    return model(TOKENS[:, :-1], TOKENS[:, 1:], None, leaf), leaf, None if model.last else gradient


def gradients(model, leaf):
    """Of everything that has one."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found if leaf is None else found | {"input": leaf.grad}


def equal(one, other):
    """To the last bit; nothing is missing."""
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", [None, range(2), range(1, 4), range(2, 5)])
def test_loss_and_gradients_have_the_same_bits(units, dtype):
    """Of a model and of any part of one; in one go and in two halves."""
    kept, computed, halved = (part(units=units, dtype=dtype, recompute=again) for again in (False, True, True))
    output, leaf, gradient = forward(kept, dtype)
    torch.autograd.backward(output, gradient)
    expected = gradients(kept, leaf)
    output, leaf, gradient = forward(computed, dtype)
    torch.autograd.backward(output, gradient)
    assert equal(expected, gradients(computed, leaf))
    deferred = Deferred(halved)
    deferred.prepare((BATCH, LENGTH))
    output, leaf, gradient = forward(halved, dtype)
    half = deferred.backward(output, gradient, leaf)
    assert {name for name, parameter in halved.named_parameters() if parameter.grad is None} == deferred.late
    half.weights()
    if leaf is not None:
        leaf.grad = half.input_gradient
    assert equal(expected, gradients(halved, leaf))


class Kept:
    """A tensor that a graph holds; not with its own graph, which would hold itself."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()


def kept_bytes(model):
    """Bytes that the graph holds after the forward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive = weakref.WeakSet()

    def pack(tensor):
        box = Kept(tensor)
        alive.add(box)
        return box

    with saved_tensors_hooks(pack, lambda box: box.tensor):
        loss, _, _ = forward(model)
    gc.collect()
    assert loss.requires_grad
    return sum(box.tensor.nbytes for box in alive if box.tensor.untyped_storage().data_ptr() not in weights)


def test_a_block_more_costs_its_input_and_nothing_else():
    """Without, it costs many times as much."""
    one = BATCH * LENGTH * WIDTH * 4
    computed, kept = ([kept_bytes(part(layers=layers, recompute=recompute)) for layers in (2, 3)]
                      for recompute in (True, False))
    assert computed[1] - computed[0] == one
    assert kept[1] - kept[0] > 10 * one


def test_a_block_whose_input_needs_no_gradient_is_run_as_it_is():
    """Its weights would never have theirs; and without gradients nothing is recorded."""
    layer, x = nn.Linear(3, 3), torch.ones(1, 3)
    again(layer, x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert not again(layer, x.requires_grad_()).requires_grad
