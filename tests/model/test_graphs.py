"""Blocks played as CUDA graphs, by a stand-in for PyTorch's recorder that works in fixed memory as recordings do.

It plays the recorded code on tensors that are always the same ones, wipes what was in them before, and does not let a
second forward pass begin before the backward pass of the first, where a GPU would compute wrong numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpilm import assemble
from mpilm.launch import session
from mpilm.model import graphs
from mpilm.model.gpt import GPT
from mpilm.model.shape import Shape
from tests.helpers import everywhere
from tests.training_cases import LENGTH, VOCAB, alone, arithmetic, batch_of, configuration, parallel, same

pytestmark = pytest.mark.ranks(max=2)


class Tape:
    """A recording: `run` on inputs of its own."""

    def __init__(self, module, sample):
        x, places = sample
        self.module, self.places, self.played = module, places, 0
        self.weights = list(module.parameters())
        self.x = x.detach().clone().requires_grad_()
        self.y, self.dy = torch.empty_like(x), torch.empty_like(x)
        self.gradients = [torch.empty_like(one) for one in (self.x, *self.weights)]
        self.made = None

    def __call__(self, x, places):
        for mine, given in zip([self.places.rotary, *self.places.masks], [places.rotary, *places.masks], strict=True):
            mine.data.copy_(given)      # a GPU that plays knows nothing of autograd's versions
        return _Play.apply(self, x, *self.weights)

    def forward(self, x):
        assert self.made is None, "a forward pass before the backward pass of the one before"
        self.played += 1
        self.x.data.copy_(x)
        with torch.enable_grad():
            self.made = self.module.block(self.x, self.places)
        return self.y.fill_(torch.nan).copy_(self.made.detach())

    def backward(self, dy):
        self.dy.copy_(dy)
        found = torch.autograd.grad(self.made, (self.x, *self.weights), self.dy)
        self.made = None
        for mine, new in zip(self.gradients, found, strict=True):
            mine.fill_(torch.nan).copy_(new)
        return self.gradients


class _Play(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tape, x, *weights):
        ctx.tape = tape
        return tape.forward(x).detach()

    @staticmethod
    def backward(ctx, dy):
        return None, *(gradient.detach() for gradient in ctx.tape.backward(dy))


@pytest.fixture
def tapes(monkeypatch):
    """All that are made in this test."""
    made = []

    def record(modules, samples):
        made.extend(map(Tape, modules, samples))
        return tuple(made[-len(modules):])
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return made


class Stubbed:
    """PyTorch's own recorder without a GPU: what is recorded is computed once, and playing it does nothing."""

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        self.over()

    def over(self):
        """A recording is complete."""

    def replay(self):
        pass


def node(weight):
    """What takes its gradient, and calls its hooks: one node for as long as a graph has it."""
    return weight.view_as(weight).grad_fn.next_functions[0][0]


@pytest.mark.serial
def test_a_recording_keeps_no_graph(monkeypatch):
    """Else hooks of weights would be called on the stream of the recording: by PyTorch's own code."""
    shape = Shape(layers=3, width=32, heads=4, kv_heads=2, vocab_size=67)
    model = GPT(shape)
    model.initialize(seed=1)
    blocks, seen = list(model.layers.values()), []
    weights = [weight for block in blocks for weight in block.parameters()]

    def tag(_):
        for weight in weights:
            node(weight).metadata["recorded"] = True
        seen.append("recorded" in node(weights[0]).metadata)
    monkeypatch.setattr(Stubbed, "over", tag)
    for name in ("Stream", "stream", "graph", "CUDAGraph", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, Stubbed)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    x = torch.ones(2, 8, 32)
    places = model.places(torch.zeros(2, 8, dtype=torch.int64), None)
    played = graphs.record(blocks, x, places)
    assert seen.count(True) >= len(blocks), "none was kept while it was recorded"
    assert not any("recorded" in node(weight).metadata for weight in weights)
    y = played[0](x.requires_grad_(), places)
    mine = [node(weight) for weight in blocks[0].parameters()]
    assert [after for after, _ in y.grad_fn.next_functions[-len(mine):]] == mine
    assert played[0](x[:1], places).grad_fn.name() != y.grad_fn.name()


def recorded(**options):
    """A configuration with recordings."""
    config = configuration(**options)
    config.run.graphs = True
    return config


@pytest.mark.parametrize(("kind", "level"), [("allreduce", 1), ("sharded", 2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_steps_have_the_same_bits(precision, kind, level, tapes, comm):
    found = parallel(recorded(kind=kind, level=level, collective="shared"), precision=precision)
    everywhere(comm, len(tapes) == 2 and all(tape.played for tape in tapes))
    everywhere(comm, same(alone(configuration(), precision=precision), found))


def test_masked_documents_have_the_same_bits(tapes, comm):
    """Their masks are others in every slot."""
    found = []
    with session() as world:
        for config in (configuration(), recorded()):
            config.data.mask_documents = True
            core = assemble.build(config, world, assemble.shape_of(config, VOCAB), arithmetic(config))
            assemble.restore(core, assemble.shape_of(config, VOCAB), config, None)
            batch = batch_of(core)
            documents = batch.inputs // 20 + torch.arange(len(batch.inputs))[:, None, None].numpy()
            batch = batch._replace(documents=documents.cumsum(-1) // LENGTH)
            mine = core.pipeline.run(batch)
            core.update.begin(0)
            core.sync.step(core.update)
            found.append((core.losses.mean(mine), core.sync.grad_norm))
    everywhere(comm, bool(tapes) and found[0] == found[1], str(found))


def test_only_training_plays_them(tapes, comm):
    """Of evaluation several forward passes are under way; a slot of another shape is computed as it was."""
    with session() as world:
        config = recorded(sequences=8)
        core = assemble.build(config, world, assemble.shape_of(config, VOCAB), arithmetic(config))
        assemble.restore(core, assemble.shape_of(config, VOCAB), config, None)
        batch = batch_of(core)
        evaluated = core.pipeline.evaluate(batch)
        everywhere(comm, not any(tape.played for tape in tapes))
        everywhere(comm, np.allclose(core.pipeline.run(batch), evaluated, rtol=1e-6))
        everywhere(comm, all(tape.played == len(batch.inputs) for tape in tapes))
        core.sync.step(core.update)
        shorter = batch._replace(inputs=batch.inputs[..., :-2], targets=batch.targets[..., :-2])
        core.pipeline.run(shorter)
        core.sync.step(core.update)     # nothing is under way any more
        everywhere(comm, all(tape.played == len(batch.inputs) for tape in tapes))
        world.comm.Barrier()
