"""Any pipeline on any number of ranks trains the model of one rank, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpilm import assemble
from mpilm.arithmetic import Arithmetic
from mpilm.comm import arrays
from mpilm.data.loader import Batch
from mpilm.launch import session
from mpilm.parallel import schedules
from tests.helpers import everywhere
from tests.training_cases import VOCAB, alone, configuration, parallel, same

every_schedule = pytest.mark.parametrize("name", sorted(schedules.MENU))


def layouts(comm):
    """Every pp that divides the number of ranks; the model has four pieces, so four stages at most."""
    return [pp for pp in range(1, comm.size + 1) if comm.size % pp == 0]


def options(name, pp):
    """As many chunks as the model has pieces for."""
    return {"pp": pp, "schedule": name, "chunks": 4 // pp}


@pytest.mark.turns(at=(3, 4))
@every_schedule
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_have_the_bits_of_one_rank(name, precision, comm):
    """Losses, gradient norms, weights; with messages that MPI could buffer, and in one precision with none it may."""
    expected = alone(configuration(), precision=precision)
    for pp in layouts(comm):
        for synchronous in (False, True)[:2 if precision == "fp32" else 1]:
            found = parallel(configuration(**options(name, pp)), precision=precision, synchronous=synchronous)
            everywhere(comm, same(expected, found), f"{name}, pp {pp}, synchronous {synchronous}")


@every_schedule
def test_blocks_that_are_computed_again_have_the_same_bits(name, comm):
    """Under every schedule, those that split the backward pass too."""
    expected = alone(configuration())
    found = parallel(configuration(recompute=True, **options(name, comm.size)))
    everywhere(comm, same(expected, found), name)


@pytest.mark.slow
@pytest.mark.ranks(min=2)
@pytest.mark.filterwarnings("ignore")     # the compiler warns of its own code
def test_compiled_code_has_the_same_bits(comm):
    """Every rank compiles for itself, and what it runs does not depend on how much of a step falls to it; also where
    backward passes are split and blocks computed again."""
    expected = alone(configuration(), precision="bf16", compiled=True)
    torch._dynamo.reset()
    found = parallel(configuration(pp=comm.size, schedule="zb", recompute=True), precision="bf16", compiled=True)
    everywhere(comm, same(expected, found), f"{found[:2]}, not {expected[:2]}")


def test_stages_dealt_by_hand_have_the_same_bits(comm):
    """However the blocks lie."""
    expected = alone(configuration())
    split = ",".join(["2", *["0"] * (comm.size - 1)]) if comm.size <= 2 else "0," * (comm.size - 3) + "1,1,0"
    everywhere(comm, same(expected, parallel(configuration(pp=comm.size, split=split))), split)


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_longer_than_a_message_have_the_same_bits(precision, comm, monkeypatch):
    """They go in pieces, of which the last is shorter."""
    expected = alone(configuration(), precision=precision)
    monkeypatch.setattr(arrays, "MESSAGE_BYTES", 600)
    for synchronous in (False, True):
        found = parallel(configuration(pp=comm.size), precision=precision, synchronous=synchronous)
        everywhere(comm, same(expected, found), f"synchronous {synchronous}")


@pytest.mark.ranks(min=2)
def test_each_rank_holds_its_own_layers_only(comm):
    """Together every parameter once in each replica."""
    held = comm.allgather(sorted(parallel(configuration(pp=comm.size))[2]))
    names = [name for rank in held for name in rank]
    assert len(names) == len(set(names)) == len(assemble.shape_of(configuration(), VOCAB).parameters())
    assert all(held)


def long_batch(core, size, length):
    """Tokens of my slots, the same on all ranks of a pipeline."""
    tokens = np.random.default_rng(core.slots.start).integers(0, VOCAB, (len(core.slots), size, length + 1))
    return Batch(tokens[..., :-1], tokens[..., 1:], np.zeros_like(tokens[..., 1:]))


@every_schedule
def test_messages_far_above_what_is_buffered(name, comm, watch):
    """128 KiB each, both ways at once; evaluation has the same losses as training, before the update."""
    config = configuration(micro_batch_size=2, **options(name, comm.size))
    with session() as world, watch(60):
        core = assemble.build(config, world, assemble.shape_of(config, VOCAB),
                              Arithmetic("fp32", False, 1, 2, True, "", ""))
        assemble.restore(core, assemble.shape_of(config, VOCAB), config, None)
        batch = long_batch(core, 2, 256)
        evaluated = core.losses.mean(core.pipeline.evaluate(batch))
        trained = core.losses.mean(core.pipeline.run(batch))
        core.update.begin(0)
        core.sync.step(core.update)
        assert core.pipeline.wait_s >= 0
        everywhere(comm, abs(evaluated - trained) < 1e-5, f"{evaluated} {trained}")
        world.comm.Barrier()


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("bad", ["first", "last"])
def test_a_bad_gradient_on_one_stage_skips_the_step_on_all(comm, bad):
    """Nothing changes anywhere, and it is counted everywhere."""
    config = configuration(pp=comm.size)
    with session() as world:
        core = assemble.build(config, world, assemble.shape_of(config, VOCAB),
                              Arithmetic("fp32", False, 1, 1, True, "", ""))
        assemble.restore(core, assemble.shape_of(config, VOCAB), config, None)
        before = {name: value.detach().clone() for name, value in core.parameters().items()}
        if comm.rank == (0 if bad == "first" else comm.size - 1):
            next(iter(core.parameters().values())).register_hook(lambda gradient: gradient * np.nan)
        core.pipeline.run(long_batch(core, 1, 16))
        core.update.begin(0)
        core.sync.step(core.update)
        everywhere(comm, (core.update.applied, core.update.skipped) == (0, 1), str(core.sync.grad_norm))
        everywhere(comm, all(torch.equal(before[name], value) for name, value in core.parameters().items()))
        world.comm.Barrier()
