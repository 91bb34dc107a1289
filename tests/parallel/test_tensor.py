"""Layers that ranks share, against the same layers whole: values and gradients, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.log import UserError
from mpilm.model.gpt import GPT
from mpilm.model.layers import RMSNorm
from mpilm.model.shape import Shape
from mpilm.model.slices import Slices
from mpilm.parallel import exchange, vocabulary
from mpilm.parallel.tensor import Team
from tests.helpers import everywhere, same_everywhere

LARGEST = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03}      # relative difference


def build(name, comm, *, rows=64, width=64, dtype=torch.float64):
    """The exchange, or None where its collective cannot work on so many ranks."""
    try:
        return exchange.build(name, comm, rows=rows, width=width, dtype=dtype)
    except UserError:
        return None


ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.01}
NAMES = ["shared", "ring", "tree", "mpi"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 5), width=st.integers(1, 9), dim=st.integers(0, 2),
       dtype=st.sampled_from(list(LARGEST)), seed=st.integers(0, 99))
def test_what_is_exchanged(comm, name, batch, tokens, width, dim, dtype, seed):
    """Each rank can tell what all the others gave, and what the sum must be; many exchanges follow each other."""
    sizes = [batch, tokens, width]
    sizes[dim] *= comm.size
    given_by = [torch.randn(sizes, generator=torch.Generator().manual_seed(100 * rank + seed)).to(dtype)
                for rank in range(comm.size)]
    through = build(name, comm, rows=3 * 5 * comm.size, width=9 * comm.size, dtype=dtype)
    if through is None:
        return
    mine = given_by[comm.rank]
    whole = through.gather(mine, dim)
    part = through.scatter(mine, dim)
    gathered = torch.equal(whole, torch.cat(given_by, dim))
    exact = torch.stack([x.double() for x in given_by]).sum(0).chunk(comm.size, dim)[comm.rank]
    near = torch.allclose(part.double(), exact, rtol=ROUNDING[dtype], atol=1e-5)
    everywhere(comm, gathered and part.dtype == dtype and near, f"gathered: {gathered}, scattered: {part}, not {exact}")
    through.free()


def test_ranks_at_different_places_are_told(comm):
    """Instead of being given each other's activations."""
    through = exchange.build("shared", comm, rows=8, width=8, dtype=torch.float32)
    if comm.size > 1:
        with pytest.raises(AssertionError, match="exchange different things"):
            through.gather(torch.zeros(1, 2 if comm.rank else 3, 4), 1)
    comm.Barrier()
    through.free()


@st.composite
def shapes(draw, size):
    """A model whose layers so many ranks can share."""
    kv_heads = size * draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    return Shape(layers=draw(st.integers(1, 2)), width=heads * draw(st.sampled_from([2, 6])), heads=heads,
                 kv_heads=kv_heads, hidden=size * draw(st.integers(1, 9)), vocab_size=size * draw(st.integers(2, 9)),
                 tied_embeddings=draw(st.booleans()))


def model(shape, dtype, split=None):
    """With initial weights."""
    made = GPT(shape, split=split) if split else GPT(shape)
    made.to(dtype).initialize(seed=3)
    return made.train()


def texts(shape, batch, length):
    """Inputs and targets, the same on every rank."""
    draw = torch.Generator().manual_seed(batch)
    return torch.randint(shape.vocab_size, (2, batch, length), generator=draw)


def difference(found, expected):
    """Largest difference, relative to the largest value."""
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-300)).item()


def mine(whole, slices, name):
    """What of a whole model's parameter (or its gradient) a rank of a team holds."""
    rows = [dimensions[0] for dimensions in slices.shape.parts(name).values()]
    tensors = dict(zip(slices.shape.parts(name), torch.split(whole, rows), strict=True))
    return torch.cat([part.cut(tensors[part.tensor]) for part in slices.parts(name)])


@pytest.mark.turns(at=(4, 3))
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(data=st.data(), batch=st.integers(1, 2), length=st.integers(1, 6), documents=st.booleans())
def test_losses_and_gradients_are_those_of_the_whole_model(comm, name, data, batch, length, documents):
    """Float64: column- and row-parallel matrices, embedding, cross-entropy, and norms of a rank's own tokens."""
    check(comm, name, data.draw(shapes(comm.size)), batch, length * comm.size, documents, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(comm, dtype):
    """Within their rounding."""
    shape = Shape(layers=2, width=24 * comm.size, heads=2 * comm.size, hidden=32 * comm.size, vocab_size=25 * comm.size)
    check(comm, "shared", shape, 2, 8 * comm.size, documents=False, dtype=dtype)


def check(comm, name, shape, batch, length, documents, dtype):
    """Compare a team of all ranks with one rank that has it all."""
    through = build(name, comm, rows=batch * length, width=shape.width, dtype=dtype)
    if through is None:
        return
    inputs, targets = texts(shape, batch, length)
    ids = torch.arange(length).div(3, rounding_mode="floor").expand(batch, -1) if documents else None
    whole, part = model(shape, dtype), model(shape, dtype, Team(through))
    losses = [made(inputs, targets, documents=ids) for made in (whole, part)]
    for loss in losses:
        loss.backward()
    everywhere(comm, difference(losses[1], losses[0]) < LARGEST[dtype], f"{losses} of {shape}")
    slices = Slices(shape, comm.rank, comm.size)
    apart = {name: difference(held.grad.flatten(), mine(whole.get_parameter(name).grad, slices, name))
             for name, held in part.named_parameters()}
    everywhere(comm, max(apart.values()) < LARGEST[dtype], f"{apart} of {shape}")
    by_all = [held.grad.float() for held in part.parameters() if held.dim() == 1]
    same_everywhere(comm, torch.cat(by_all).numpy())
    with torch.no_grad():
        surprises = [made.eval()(inputs, targets, documents=ids) for made in (whole, part)]
        logits = [made(inputs, documents=ids) for made in (whole, part)]
    apart = {"loss": difference(surprises[1], surprises[0]),
             "logits": difference(logits[1], logits[0].chunk(comm.size, -1)[comm.rank]) / 4}
    everywhere(comm, max(apart.values()) < LARGEST[dtype], f"without gradients: {apart}")
    through.free()


def test_a_shared_weights_gradient_is_the_sum_over_what_its_ranks_contribute(comm):
    """The formula, for a norm that sees a rank's own tokens: each rank's contribution, and their sum."""
    through = exchange.build("shared", comm, rows=5 * comm.size, width=8, dtype=torch.float64)
    x = torch.randn(1, 5 * comm.size, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    contributions = []
    for rank in range(comm.size):
        norm = RMSNorm(8, eps=1e-5).double()
        torch.nn.init.ones_(norm.weight)
        norm(x.chunk(comm.size, 1)[rank]).square().sum().backward()
        contributions.append(norm.weight.grad)
    norm = RMSNorm(8, eps=1e-5, split=Team(through)).double()
    torch.nn.init.ones_(norm.weight)
    norm(x.chunk(comm.size, 1)[comm.rank]).square().sum().backward()
    everywhere(comm, torch.allclose(norm.weight.grad, torch.stack(contributions).sum(0), rtol=1e-12))
    same_everywhere(comm, norm.weight.grad.numpy())
    through.free()


def test_no_rank_ever_has_all_logits(comm, monkeypatch):
    """Of a token: those of its own words only; of the others two numbers."""
    seen, sums = [], vocabulary.sums
    monkeypatch.setattr(vocabulary, "sums", lambda logits: seen.append(logits.shape) or sums(logits))
    shape = Shape(layers=1, width=8 * comm.size, heads=comm.size, hidden=16 * comm.size,
                  vocab_size=30 * comm.size)
    through = exchange.build("shared", comm, rows=4 * comm.size, width=shape.width, dtype=torch.float32)
    inputs, targets = texts(shape, 1, 4 * comm.size)
    made = model(shape, torch.float32, Team(through))
    made(inputs, targets).backward()
    everywhere(comm, seen == [(4 * comm.size, 30)], str(seen))
    through.free()


def test_the_bits_are_the_same_every_time(comm):
    """Whoever arrives first."""
    shape = Shape(layers=2, width=24 * comm.size, heads=2 * comm.size, hidden=32 * comm.size,
                  vocab_size=25 * comm.size)
    gradients = []
    for _ in range(2):
        through = exchange.build("shared", comm, rows=16 * comm.size, width=shape.width, dtype=torch.bfloat16)
        made = model(shape, torch.bfloat16, Team(through))
        made(*texts(shape, 2, 8 * comm.size)).backward()
        gradients.append(np.concatenate([p.grad.float().flatten().numpy() for p in made.parameters()]))
        through.free()
    everywhere(comm, (gradients[0] == gradients[1]).all())
