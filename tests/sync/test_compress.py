"""Every code of the menu: its size, its error, its residual, and sums over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from mpilm import assemble
from mpilm.arithmetic import Arithmetic
from mpilm.comm import collectives, order
from mpilm.comm.node import Node
from mpilm.comm.p2p import Traffic
from mpilm.data.loader import Batch
from mpilm.launch import session
from mpilm.log import UserError
from mpilm.sync import compress
from mpilm.sync._layout import Parameter, lay_out
from mpilm.sync.compress import Codec, onebit
from mpilm.sync.compress._base import CHUNK
from mpilm.sync.compress._exchange import UNDER_WAY, Exchange
from mpilm.sync.compress._parcels import HEAD
from tests.helpers import everywhere, same_everywhere
from tests.training_cases import LENGTH, VOCAB, configuration, windows

STEPS = 30
COUNTS = st.one_of(st.integers(0, 3000), st.sampled_from([1 << 16, (1 << 16) + 1, 200_003]))
# Bytes for 2^20 values, and the largest error of a value over the largest value of all.
PROMISED = {"none": (4 << 20, 0.0), "bf16": (2 << 20, 2**-8), "int8": ((1 << 20) + (4 << 12), 1 / 253),
            "topk": (16 * 6 * 656, 1.0), "onebit": ((1 << 17) + (8 << 10), 1.0)}


def draw(count: int, seed: int, *more: int) -> torch.Tensor:
    """Values of very different sizes."""
    random = np.random.default_rng([count, seed, *more])
    return torch.from_numpy((random.normal(size=count) * 10.0 ** random.integers(-3, 4, count)).astype(np.float32))


def there_and_back(codec, values):
    data = np.full(codec.size(values.numel()), 255, np.uint8)
    codec.encode(values, data)
    out = torch.full_like(values, torch.nan)
    codec.decode(data, out)
    return out


@pytest.fixture(params=[name for name in compress.names() if issubclass(compress.get(name), compress.Codec)])
def name(request):
    """Every codec of the menu."""
    return request.param


@pytest.mark.serial
@given(count=COUNTS, seed=st.integers(0, 99))
def test_every_value_comes_back_within_the_promised_error(name, count, seed):
    """And the bytes are those promised."""
    codec, values = compress.get(name)(), draw(count, seed)
    size, bound = PROMISED[name]
    assert codec.size(1 << 20) == size
    error = (there_and_back(codec, values) - values).abs()
    assert count == 0 or error.max() <= bound * values.abs().max()


@pytest.mark.serial
@given(count=COUNTS, seed=st.integers(0, 99))
def test_nothing_is_lost_but_what_the_residual_holds(name, count, seed):
    """After any number of steps: what was sent and what is kept make up what was given."""
    codec = compress.get(name)()
    residual, data = torch.zeros(count), np.empty(codec.size(count), np.uint8)
    given_, sent = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for step in range(4):
        values = draw(count, seed, step)
        given_ += values
        codec.squeeze(values, residual, data)
        assert torch.equal(there_and_back_of(codec, data, count), values)
        sent += values
    assert torch.allclose(sent + residual, given_, rtol=0, atol=1e-2)


def there_and_back_of(codec, data, count):
    out = torch.empty(count)
    codec.decode(data, out)
    return out


@pytest.mark.serial
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(name, poison):
    """A step with such a gradient must be skipped, so nobody may be made to believe in a finite one."""
    values = draw(5000, 1)
    values[1234] = poison
    assert not torch.isfinite(there_and_back(compress.get(name)(), values)).all()


@pytest.mark.serial
def test_zeros_stay_zeros(name):
    """Blocks without a scale."""
    assert torch.equal(there_and_back(compress.get(name)(), torch.zeros(3000)), torch.zeros(3000))


@pytest.mark.serial
def test_topk_sends_the_largest():
    """One of a hundred, exactly."""
    values = draw(1000, 7)
    largest = values.abs().topk(10).indices
    wanted = torch.zeros(1000)
    wanted[largest] = values[largest]
    assert torch.equal(there_and_back(compress.get("topk")(), values), wanted)


@pytest.mark.serial
def test_bits_are_packed_alike_anywhere():
    """In the order that NumPy has."""
    bits = torch.rand(8 * 1001, generator=torch.Generator().manual_seed(1)) < 0.3
    packed = onebit.pack(bits)
    assert torch.equal(onebit.pack_anywhere(bits), packed)
    assert torch.equal(onebit.unpack_anywhere(packed), onebit.unpack(packed))
    assert torch.equal(onebit.unpack(packed), bits.to(torch.uint8))


@pytest.mark.serial
def test_int8_leaves_for_later_what_is_small_beside_its_chunk():
    """An embedding of which two rows were read: the others send nothing, and arrive once they have grown."""
    codec, values = compress.get("int8")(), torch.full((1 << 16,), 1e-4)
    values[:512] = 1.0
    residual, data = torch.zeros(1 << 16), np.empty(codec.size(1 << 16), np.uint8)
    arrived = torch.zeros(1 << 16)
    for step in range(20):
        mine = values.clone()
        codec.squeeze(mine, residual, data)
        assert step or not mine[512:].any()
        arrived += mine
    assert torch.allclose(arrived[512:], torch.tensor(20e-4), atol=1e-3)
    assert torch.allclose(arrived + residual, 20 * values)


@pytest.mark.serial
def test_an_unknown_code_is_refused_with_those_there_are():
    """Also the name of the file behind `none`."""
    for wrong in ("float32", "zip", ""):
        with pytest.raises(UserError, match="bf16, int8, none, onebit, powersgd, topk"):
            compress.get(wrong)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 70_001])
def test_a_sum_over_ranks_is_exact_but_for_the_residuals(name, count, small, comm: MPI.Comm):
    """What all ranks were given is what came out and what all residuals hold; every rank has the same bits."""
    exact_but_for_residuals(Exchange(compress.get(name)(), comm, count, small=small), comm, count)


@pytest.mark.turns(at=(3, 4))
@pytest.mark.parametrize("name", ["none", "onebit"])     # the longest and the shortest messages
@pytest.mark.parametrize(("small", "synchronous"), [(False, False), (False, True), (True, False)])
def test_room_is_used_again_when_what_was_there_is_through(name, small, synchronous, comm: MPI.Comm, monkeypatch):
    """More pieces than are under way; also under an MPI that buffers nothing."""
    monkeypatch.setattr(Codec, "PIECE", CHUNK)
    count = (2 * UNDER_WAY * CHUNK + 1234) * comm.size
    exchange = Exchange(compress.get(name)(), comm, count, small=small)
    assert len(exchange.pieces) > 2 * UNDER_WAY
    for turn in exchange._turns:
        turn.ledger.synchronous = synchronous
    exact_but_for_residuals(exchange, comm, count)


def exact_but_for_residuals(exchange, comm, count):
    """Over two steps."""
    given_, out = np.zeros(count), np.zeros(count)
    for step in range(2):
        buffer = draw(count, 3, comm.rank, step).numpy()
        given_ += comm.allreduce(buffer.astype(np.float64))
        exchange.reduce(buffer)
        same_everywhere(comm, buffer)
        out += buffer
    left = exchange.lost.numpy().astype(np.float64)
    left[exchange.mine] += exchange.lost_in_sum.numpy()
    out += comm.allreduce(left)
    everywhere(comm, np.allclose(out, given_, rtol=0, atol=1e-2), "the sum of all steps")


def test_a_sum_is_as_near_as_promised(comm: MPI.Comm):
    """The error of every rank's values and that of their sum; nothing grows with the way a value takes."""
    count = 70_001
    for name, (_, bound) in PROMISED.items():
        if bound < 1:
            buffer = draw(count, 3, comm.rank).numpy()
            exact, largest = comm.allreduce(buffer.astype(np.float64)), comm.allreduce(float(np.abs(buffer).max()))
            Exchange(compress.get(name)(), comm, count).reduce(buffer)
            error = np.abs(buffer - exact).max()
            everywhere(comm, error <= (bound + bound * (1 + bound) + 1e-6) * largest, f"{name}: {error}")


def test_without_compression_it_is_the_sum_in_tree_order(comm: MPI.Comm):
    """To the bit."""
    count = 40_000
    buffer = draw(count, 5, comm.rank).numpy()
    Exchange(compress.get("none")(), comm, count).reduce(buffer)
    values = [draw(count, 5, rank) for rank in range(comm.size)]
    for into, other in order.tree(comm.size):
        values[into] = values[into] + values[other]
    everywhere(comm, np.array_equal(buffer, values[0].numpy()), "the sum")


def test_gaps_between_parameters_do_not_enter(name, comm: MPI.Comm):
    """They stay zero, which nobody overwrites from step to step; values are sums as if there were none."""
    sizes = [Parameter("a", 300, True), Parameter("b", 3 * order.BLOCK, True), Parameter("c", 7, True)]
    layout, = lay_out(sizes, 1 << 20, owners=1)
    node = Node.build(comm)
    ring = collectives.get("ring")(comm, node)
    codec, count = compress.get(name)(), sum(parameter.count for parameter in sizes)
    reduce, beside = codec.over(ring, layout), Exchange(codec, comm, count)
    buffer = np.zeros(layout.count, np.float32)
    runs = layout.runs_in(slice(0, layout.count))
    assert len(runs) == 2, "b and what follows it lie side by side"
    for step in range(3):
        packed = draw(count, 4, comm.rank, step).numpy()
        for run, part in zip(runs, np.split(packed, [runs[0].stop - runs[0].start]), strict=True):
            buffer[run] = part
        reduce(buffer)
        beside.reduce(packed)
        everywhere(comm, np.array_equal(np.concatenate([buffer[run] for run in runs]), packed), f"step {step}")
        everywhere(comm, not any(buffer[gap].any() for gap in layout.gaps()), "gaps")
    ring.free()
    node.free()


def test_the_bytes_sent_are_those_of_the_code(name, comm: MPI.Comm):
    """Two times every other rank's share of the encoded buffer, and what each message says of itself."""
    count = 1 << 18
    exchange, before = Exchange(compress.get(name)(), comm, count, small=False), Traffic.sent
    exchange.reduce(draw(count, 1, comm.rank).numpy())
    sent = Traffic.sent - before
    sizes = [HEAD * len(exchange.pieces) + exchange.codec.size(piece.stop - piece.start) for piece in exchange.cut]
    mine = sizes[comm.rank]
    everywhere(comm, sent == sum(sizes) - mine + mine * (comm.size - 1), f"{sent}")


def test_values_that_are_not_finite_do_not_stay(name, comm: MPI.Comm):
    """The next sum is finite again."""
    exchange = Exchange(compress.get(name)(), comm, 3000)
    poisoned = np.full(3000, np.nan if comm.rank == comm.size - 1 else 1.0, np.float32)
    exchange.reduce(poisoned)
    buffer = draw(3000, 2, comm.rank).numpy()
    exchange.reduce(buffer)
    everywhere(comm, bool(np.isfinite(buffer).all() and not np.isfinite(poisoned).all()), "finite again")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in compress.names() if name != "none"])
def test_training_with_it_learns_what_training_without_learns(name, comm: MPI.Comm):
    """Steps over one small batch: most of the loss goes, as it does uncompressed; all ranks hold the same bits."""
    losses = course(name, comm)
    assert losses[-1] < losses[0] / 2, losses


def course(name, comm):
    """The losses of STEPS steps, the first five of them uncompressed."""
    config = configuration("mpi", reproducible=False)
    config.sync.compress, config.sync.compress_warmup, config.run.steps = name, 5, STEPS
    with session() as world:
        shape = assemble.shape_of(config, VOCAB)
        core = assemble.build(config, world, shape, Arithmetic("fp32", False, 1, 1, False, "", ""))
        assemble.restore(core, shape, config, None)
        tokens = windows(0).reshape(-1, 1, LENGTH + 1)[core.slots.start:core.slots.stop]
        losses = []
        for step in range(STEPS):
            mine = core.pipeline.run(Batch(tokens[..., :-1], tokens[..., 1:], None))
            core.update.begin(step)
            core.sync.step(core.update)
            losses.append(core.losses.mean(mine))
        same_everywhere(comm, torch.cat([p.detach().flatten() for p in core.parameters().values()]).numpy())
        world.comm.Barrier()
        return losses
