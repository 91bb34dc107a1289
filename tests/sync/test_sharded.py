"""Memory divided over the ranks, at every level, by every collective: the bits of one rank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpilm import connect
from mpilm.comm.worker import Inline
from mpilm.data.loader import Batch
from mpilm.launch import session
from mpilm.log import UserError
from mpilm.options import parse
from mpilm.parallel.losses import Losses
from mpilm.validation import filled
from tests import hybrid_cases
from tests.helpers import everywhere
from tests.training_cases import LENGTH, SEQUENCES, alone, batch_of, build, configuration, parallel, sharded, windows

LEVELS = (1, 2, 3)
every_level = pytest.mark.parametrize("level", LEVELS)
fixed_order = pytest.mark.parametrize("name", ["shared", "tree"])


def same(one, other):
    """Losses and norms equal, and so are all parameters that `other` holds."""
    return one[:2] == other[:2] and all(torch.equal(one[2][name], value) for name, value in other[2].items())


def power_of_two(size):
    """What `tree` takes."""
    return size & (size - 1) == 0


@fixed_order
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_have_the_bits_of_one_rank(name, precision, comm):
    """Losses, gradient norms, weights; several slots a rank."""
    if name == "tree" and not power_of_two(comm.size):
        pytest.skip("no power of two of ranks")
    expected = alone(configuration(), precision=precision)
    for level in LEVELS:
        everywhere(comm, same(expected, parallel(sharded(name, level), precision=precision)), f"level {level}")


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_over_several_nodes(ranks_per_node, comm, monkeypatch):
    """Emulated ones; of three ranks a node has two and the other one."""
    monkeypatch.setenv("MPILM_RANKS_PER_NODE", str(ranks_per_node))
    expected = alone(configuration())
    for level in LEVELS:
        everywhere(comm, same(expected, parallel(sharded("shared", level))), f"level {level}")


@pytest.mark.parametrize("name", ["ring", "mpi", "shared"])
def test_the_fast_mode_is_near(name, comm):
    """Any number of ranks that divides the slots, three too; all ranks hold the same bits."""
    sequences = SEQUENCES if SEQUENCES % comm.size == 0 else 2 * comm.size
    losses, norms, parameters = alone(configuration(reproducible=False, sequences=sequences))
    for level in LEVELS:
        mine = parallel(sharded(name, level, reproducible=False, sequences=sequences))
        np.testing.assert_allclose(mine[0], losses, rtol=1e-5)
        np.testing.assert_allclose(mine[1], norms, rtol=1e-4)
        for parameter, value in parameters.items():
            torch.testing.assert_close(mine[2][parameter], value, rtol=1e-4, atol=1e-5, msg=parameter)
        bits = b"".join(value.contiguous().numpy().tobytes() for value in mine[2].values())
        held = comm.allgather((mine[:2], bits))
        everywhere(comm, all(other == held[0] for other in held), f"level {level}")


@pytest.mark.ranks(min=4)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb"])
def test_two_stages_of_two_replicas_have_the_bits_of_one_rank(schedule, comm):
    """Every level, with messages that MPI may not buffer."""
    expected = alone(configuration())
    for level in LEVELS:
        config = sharded("tree", level, pp=2, schedule=schedule)
        everywhere(comm, same(expected, parallel(config, synchronous=True)), f"level {level}")


@pytest.mark.slow
@pytest.mark.ranks(min=2, max=2)
@pytest.mark.filterwarnings("ignore")     # the compiler warns of its own code
def test_compiled_code_has_the_bits_of_one_rank(comm):
    """What it keeps for the backward pass lies in weights that go and come again."""
    expected = alone(configuration(), precision="bf16", compiled=True)
    everywhere(comm, same(expected, parallel(sharded("tree", 3), precision="bf16", compiled=True)))


@every_level
def test_without_a_second_thread_the_bits_are_the_same(level, comm, monkeypatch):
    """An MPI that is called from one thread only gathers when weights are needed."""
    monkeypatch.setattr(connect, "worker", lambda *_: Inline())
    collective = "tree" if power_of_two(comm.size) else "shared"
    everywhere(comm, same(alone(configuration()), parallel(sharded(collective, level))))


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("options", [{"tied": True}, {"recompute": True}], ids=str)
def test_with_other_ways_to_save_memory(options, comm):
    """One matrix at both ends, gathered for each; blocks that are computed again in the backward pass."""
    collective = "tree" if power_of_two(comm.size) else "shared"
    expected = alone(configuration(**options))
    for level in LEVELS:
        everywhere(comm, same(expected, parallel(sharded(collective, level, **options))), f"level {level}")


@pytest.mark.parametrize("level", [1, 2])
def test_layers_of_ones_own(level, comm):
    """With chance in them: what a slot draws does not depend on whose it is."""
    config = hybrid_cases.configuration(pp=2 - comm.size % 2)
    config.sync.kind, config.sync.level = "sharded", level
    with hybrid_cases.alone(hybrid_cases.perceptron(), hybrid_cases.configuration()) as model:
        expected = hybrid_cases.course(model)
    with hybrid_cases.everyone(hybrid_cases.perceptron(), config) as model:
        everywhere(comm, hybrid_cases.same(expected, hybrid_cases.course(model)))
    config.sync.level = 3
    with pytest.raises(UserError, match="give level 2"), hybrid_cases.everyone(hybrid_cases.perceptron(), config):
        pass


def test_with_compressed_gradients(comm):
    """At level 1, as without dividing: every value is rounded by itself."""
    configs = [configuration("ring", reproducible=False), sharded("ring", 1, reproducible=False)]
    for config in configs:
        config.sync.compress = "bf16"
    everywhere(comm, same(*map(parallel, configs)))


@pytest.mark.serial
@pytest.mark.parametrize(("options", "words"), [
    ({"sync.level": 4}, "1, 2 or 3"),
    ({"sync.level": 3, "sync.compress": "int8", "run.reproducible": "false"}, "--sync.compress none"),
])
def test_what_cannot_be_divided_is_refused_with_the_remedy(options, words):
    """Before anything is built."""
    argv = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    with pytest.raises(UserError, match=words):
        parse(["--sync.kind", "sharded", *argv])


@pytest.mark.ranks(min=2, max=2)
def test_ranks_with_different_numbers_of_slots_stay_at_level_1(comm, capfd):
    """It is said, and trains all the same."""
    config = sharded("ring", 3, reproducible=False, sequences=7)
    mine = parallel(config)
    told = capfd.readouterr().err
    assert comm.rank > 0 or "have 3, 4 micro-batches" in told
    np.testing.assert_allclose(mine[0], alone(configuration(reproducible=False, sequences=7))[0], rtol=1e-5)


@every_level
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(level, comm):
    """Nothing changes anywhere, and the next step is made with the weights of before."""
    collective = "tree" if power_of_two(comm.size) else "shared"
    with session() as world:
        core = build(sharded(collective, level), world)
        norm = core.parts[-1].norm.weight
        poison = norm.register_hook(lambda g: g * np.nan) if comm.rank == comm.size - 1 else None
        norms = []
        for step in range(2):
            core.pipeline.run(batch_of(core))
            core.update.begin(step)
            core.sync.step(core.update)
            norms.append(core.sync.grad_norm)
            everywhere(comm, (core.update.applied, core.update.skipped) == (step, 1))
            if poison:
                poison.remove()
        world.comm.Barrier()
    assert np.isnan(norms[0])
    assert norms[1] == alone(configuration())[1][0]


@pytest.mark.ranks(min=2)
def test_a_model_that_does_not_tell_what_computes_is_refused(comm):
    """Its weights would be zeros."""
    with session() as world:
        core = build(sharded("ring", 3, reproducible=False, sequences=2 * comm.size), world)
        core.parts[0].around = lambda module, run, x, *rest: run(x, *rest)
        tokens = np.zeros((len(core.slots), 1, LENGTH + 1), np.int64)
        with pytest.raises(UserError, match=r"--sync\.level 2"):
            core.pipeline.run(Batch(tokens[..., :-1], tokens[..., 1:], None))
        world.comm.Barrier()


@pytest.mark.parametrize("level", [2, 3])
def test_evaluation_with_different_numbers_of_slots(level, comm):
    """All ranks do as many passes, and the loss is that of one rank."""
    with session() as world:
        core = build(sharded("shared" if not power_of_two(comm.size) else "tree", level), world)
        tokens = windows(0)[:comm.size + 1].reshape(-1, 1, LENGTH + 1)
        runs = [range(rank, rank + 1) for rank in range(comm.size - 1)] + [range(comm.size - 1, comm.size + 1)]
        mine = tokens[runs[comm.rank].start:runs[comm.rank].stop]
        batch = filled(Batch(mine[..., :-1], mine[..., 1:], None), 2)
        loss = Losses(comm, runs, MPI.COMM_SELF).mean(core.pipeline.evaluate(batch)[:len(mine)])
        everyone = Batch(tokens[..., :-1], tokens[..., 1:], None)
        losses = core.pipeline.evaluate(everyone)
        everywhere(comm, loss == math.fsum(losses) / losses.size, f"{loss} {losses}")
        world.comm.Barrier()
