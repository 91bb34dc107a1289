"""Ring attention against plain attention over the whole sequence, on any number of ranks."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI
from torch.utils._python_dispatch import TorchDispatchMode

from mpilm.comm import arrays, p2p
from mpilm.model.gpt import GPT
from mpilm.model.shape import Shape
from mpilm.parallel import tiles
from mpilm.parallel.context import Ring
from tests.helpers import everywhere, same_everywhere

LARGEST = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03}      # relative difference


def plain(q, k, v, documents=None):
    """Causal attention by the book: all scores at once, over the whole sequence."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    order = torch.arange(q.shape[1])
    visible = (order[:, None] >= order[None, :])[None, None]
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])[:, None]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def drawn(*, batch, length, heads, kv_heads, width, dtype=torch.float64, seed=1):
    """Queries, keys, values and a gradient over a whole sequence, the same on every rank."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, count, width, dtype=torch.float64, generator=draw).to(dtype)
            for count in (heads, kv_heads, kv_heads, heads)]


def some_documents(batch, length):
    """[B, T] numbers that grow; the ends of documents differ from row to row."""
    ends = torch.arange(length)[None] % torch.arange(3, 3 + batch)[:, None] == 0
    return ends.cumsum(1)


def with_gradients(attend, q, k, v, dy):
    """(y, dq, dk, dv)."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    y = attend(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def by_ring(ring, tensors, documents=None):
    """My tokens of what attention makes, and of the gradients."""
    masks = ring.masks(tensors[0].shape[1], documents, torch.device("cpu"), torch.float32)
    mine = [ring.share(x).contiguous() for x in tensors]
    return with_gradients(lambda q, k, v: ring.attend(q, k, v, masks), *mine)


def difference(found, expected):
    """Largest relative difference of tensors, each relative to its largest value."""
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300)).item()
               for a, b in zip(found, expected, strict=True))


def check(comm, *, documents=False, dtype=torch.float64, synchronous=False, **sizes):
    """Compare on all ranks."""
    ring = Ring(comm)
    for ledger in ring.ledgers:
        ledger.synchronous = synchronous
    tensors = drawn(dtype=dtype, **sizes)
    ids = some_documents(sizes["batch"], sizes["length"]) if documents else None
    found = by_ring(ring, tensors, ids)
    whole = with_gradients(lambda q, k, v: plain(q, k, v, ids), *(x.double() for x in tensors))
    expected = [ring.share(x) for x in whole]
    assert all(x.dtype == dtype for x in found)
    apart = difference(found, expected)
    everywhere(comm, apart < LARGEST[dtype], f"{apart} with {sizes}")


@settings(max_examples=15)
@given(batch=st.integers(1, 3), chunk=st.integers(1, 9), kv_heads=st.integers(1, 3), groups=st.integers(1, 3),
       width=st.sampled_from([2, 6]), documents=st.booleans(), synchronous=st.booleans())
def test_values_and_gradients_are_those_of_the_whole_sequence(comm, batch, chunk, kv_heads, groups, width, documents,
                                                              synchronous):
    """Float64, in tiles of three tokens at most, with grouped queries and documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "LEAST", 3)
        patch.setattr(tiles, "SCORES", 1)
        check(comm, batch=batch, length=2 * comm.size * chunk, heads=kv_heads * groups, kv_heads=kv_heads, width=width,
              documents=documents, synchronous=synchronous)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [False, True])
def test_other_precisions(comm, dtype, documents):
    """Within their rounding."""
    check(comm, batch=2, length=2 * comm.size * 40, heads=4, kv_heads=2, width=16, dtype=dtype, documents=documents)


@pytest.mark.ranks(max=3)
def test_messages_that_no_mpi_buffers(comm, watch, monkeypatch):
    """Blocks of some megabytes in many pieces, and every send waits for its receiver."""
    monkeypatch.setattr(arrays, "MESSAGE_BYTES", 300_000)
    with watch(60):
        check(comm, batch=1, length=2 * comm.size * 256, heads=4, kv_heads=4, width=64, synchronous=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_the_same_every_time(comm, dtype):
    """Whenever messages arrive."""
    tensors = drawn(batch=2, length=48 * comm.size, heads=4, kv_heads=2, width=8, dtype=dtype)
    first, second = (by_ring(Ring(comm), tensors) for _ in range(2))
    everywhere(comm, all(torch.equal(a, b) for a, b in zip(first, second, strict=True)))


def test_a_rank_sends_its_block_and_gradients_once_around(comm):
    """Keys and values each way in bf16, gradients in float32; nothing else."""
    ring = Ring(comm)
    tensors = drawn(batch=2, length=12 * comm.size, heads=4, kv_heads=2, width=8, dtype=torch.bfloat16)
    before = p2p.Traffic.sent
    by_ring(ring, tensors)
    elements = 2 * 2 * 12 * 2 * 8
    assert p2p.Traffic.sent - before == (comm.size - 1) * elements * (2 + 2 + 4)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are still alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage):
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, count):
        self.now -= count


def held(ring, *, length):
    """Most bytes of tensors that attention over `length` tokens holds at a time on this rank, forward and backward."""
    mine = [ring.share(x).contiguous()
            for x in drawn(batch=1, length=length, heads=4, kv_heads=2, width=32, dtype=torch.float32)]
    with Live() as live:
        with_gradients(lambda q, k, v: ring.attend(q, k, v, []), *mine)
    return live.most


@pytest.mark.ranks(max=3)
def test_memory_falls_with_the_number_of_ranks(comm, monkeypatch):
    """2,040 tokens: a rank holds its share of what one rank alone would, and four blocks that travel: keys and values
    in hand and coming, gradients that leave and that come. Alone it is far from all scores."""
    monkeypatch.setattr(tiles, "SCORES", 1 << 14)
    length, tile = 2040, 4 << 14
    block = 2 * (length // comm.size) * 2 * 32 * 4
    shared = held(Ring(comm), length=length)
    alone = comm.bcast(held(Ring(MPI.COMM_SELF), length=length) if comm.rank == 0 else None)
    everywhere(comm, shared <= alone / comm.size + 4 * block + 2 * tile, f"{shared} of {alone} bytes")
    assert alone < 4 * 4 * length ** 2 / 5


@pytest.mark.parametrize("documents", [False, True])
def test_the_model_over_a_ring_is_the_whole_model(comm, documents):
    """Losses are means over a rank's tokens, and the gradient is the sum over ranks of a size-th of theirs."""
    shape = Shape(layers=2, width=32, heads=4, kv_heads=2, vocab_size=61)
    length = 6 * 2 * comm.size
    tokens = torch.randint(61, (2, length + 1), generator=torch.Generator().manual_seed(3))
    batch = tokens[:, :-1], tokens[:, 1:], some_documents(2, length) if documents else None
    whole, shared = GPT(shape), GPT(shape, context=Ring(comm))
    losses = []
    for model in (whole, shared):
        model.initialize(seed=1)
        losses.append(model(*batch))
        losses[-1].backward()
    means = comm.allgather(losses[1].item())
    assert abs(sum(means) / comm.size / losses[0].item() - 1) < 1e-6
    for (name, one), other in zip(whole.named_parameters(), shared.parameters(), strict=True):
        total = np.empty(one.shape, np.float32)
        comm.Allreduce(other.grad.contiguous().numpy(), total)
        same_everywhere(comm, total)
        assert difference([torch.from_numpy(total) / comm.size], [one.grad]) < 1e-5, name


def three_steps(model, comm, *, documents):
    """Losses, gradient norms and weights of three steps with AdamW in float64, summed over the ranks of `comm`, which
    share every sequence."""
    length = 48        # 2 chunks for each of 1, 2, 3, 4 and 8 ranks
    model.initialize(seed=1)
    model.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    losses, norms = [], []
    for step in range(3):
        tokens = torch.randint(61, (2, length + 1), generator=torch.Generator().manual_seed(step))
        loss = model(tokens[:, :-1], tokens[:, 1:], some_documents(2, length) if documents else None)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad.copy_(torch.from_numpy(sum(comm.allgather(parameter.grad.numpy())))).div_(comm.size)
        losses.append(sum(comm.allgather(loss.item())) / comm.size)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses + norms, dtype=torch.float64), [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("documents", [False, True])
def test_three_steps_in_float64_are_those_of_one_rank(comm, documents):
    """To 1e-10: what differs in float32 is rounding, and nothing else."""
    shape = Shape(layers=2, width=32, heads=4, kv_heads=2, vocab_size=61)
    expected = three_steps(GPT(shape), MPI.COMM_SELF, documents=documents)
    found = three_steps(GPT(shape, context=Ring(comm)), comm, documents=documents)
    assert found[0].dtype == found[1][0].dtype == torch.float64
    apart = [difference([found[0]], [expected[0]]),
             *(difference([one], [other]) for one, other in zip(found[1], expected[1], strict=True))]
    everywhere(comm, max(apart) < 1e-10, str(apart))
