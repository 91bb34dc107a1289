"""Replicas that train by themselves: what they are evaluated with, what they save, and how they go on from there."""

from __future__ import annotations

import numpy as np
import pytest

from mpilm import assemble
from mpilm.checkpoint import newest
from mpilm.launch import session
from mpilm.optim import Sgd
from tests.helpers import everywhere, same_everywhere
from tests.parallel.test_context_checkpoints import save
from tests.sync.test_local_sgd import config_of, weights
from tests.sync.test_resharding import saved, step
from tests.training_cases import VOCAB, batch_of, build


@pytest.mark.turns(at=(3, 4))
@pytest.mark.parametrize("options", [{"every": 3}, {"every": 4, "fragments": 2, "outer_momentum": 0.9},
                                     {"every": 2, "local_after": 1}], ids=str)
def test_evaluation_and_checkpoint_have_the_average_and_change_nothing(options, comm):
    """Between two averages, with fragments on their way."""
    with session() as world:
        undisturbed, core = (build(config_of(comm, **options), world) for _ in range(2))
        for number in range(6):
            expected = step(undisturbed, number)
            everywhere(comm, step(core, number) == expected)
            state, before = saved(core, comm), weights(core).copy()
            everyone = np.mean(comm.allgather(before), axis=0) if 8 % comm.size == 0 else None
            with core.sync.averaged():
                average = {name: p.detach().flatten().numpy().copy() for name, p in core.parameters().items()}
            for name, values in average.items():
                everywhere(comm, np.array_equal(values, state["model", name]), name)
                same_everywhere(comm, values)
            if everyone is not None:
                np.testing.assert_allclose(np.concatenate(list(average.values())), everyone, atol=1e-6)
            everywhere(comm, np.array_equal(weights(core), before), "as before")
        world.comm.Barrier()


@pytest.mark.turns(at=(3, 4))
@pytest.mark.parametrize("kind", ["allreduce", "sharded", "local_sgd"])
def test_any_kind_goes_on_from_a_checkpoint_and_the_other_way_round(kind, comm):
    """All ranks, or one alone, begin with the average; the outer momentum comes along."""
    with session() as world:
        config = config_of(comm, every=2, outer_momentum=0.5, save_replicas=False)
        core = build(config, world)
        for number in range(3):
            step(core, number)
        state = saved(core, comm)
        for ranks in (world, world.alone()):
            config.sync.kind = kind
            other = build(config, ranks)
            other.update.applied = 3
            other.sync.load(reading(state))
            for name, parameter in other.parameters().items():
                everywhere(comm, np.array_equal(parameter.detach().flatten().numpy(), state["model", name]), name)
            before = saved(other, ranks.comm)
            for key in set(before) & set(state):
                everywhere(comm, np.allclose(before[key], state[key], rtol=1e-6, atol=1e-9), str(key))
            losses = [step(other, number)[0] for number in range(3, 5)]
            everywhere(comm, bool(np.isfinite(losses).all()))
            config.sync.kind = "local_sgd"
            again = build(config, ranks)
            again.update.applied = 3
            again.sync.load(reading(before))
            everywhere(comm, np.array_equal(weights(again), weights_of(before, again)), "back again")
            step(again, 3)
        world.comm.Barrier()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_stopped_at_an_average_without_optimizer_state_it_goes_on_at_the_same_bits(momentum, comm, monkeypatch):
    """All replicas are where they were then; the outer momentum comes along."""
    monkeypatch.setattr(assemble, "Update", Sgd)
    config = config_of(comm, every=2, outer_momentum=momentum, save_replicas=False)
    with session() as world:
        whole, again = (build(config, world) for _ in range(2))
        for number in range(4):
            step(whole, number)
        state = saved(whole, comm)
        again.update.applied = 4
        again.sync.load(reading(state))
        for number in range(4, 7):
            everywhere(comm, step(again, number) == step(whole, number), f"step {number}")
        everywhere(comm, np.array_equal(weights(again), weights(whole)))
        world.comm.Barrier()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"every": 3}, {"every": 4, "fragments": 3, "outer_lr": 0.7, "outer_momentum": 0.9},
                                     {"every": 2, "local_after": 2}], ids=str)
def test_stopped_anywhere_as_many_replicas_go_on_at_the_same_bits(options, comm):
    """Between two averages, at one, and with parts on their way; in bf16, whose weights are not the masters. Another
    number of replicas begins with the average."""
    with session() as world:
        whole = build(config_of(comm, **options), world, precision="bf16")
        states, courses = [], []
        for number in range(8):
            courses.append(step(whole, number))
            states.append(saved(whole, comm))
        for stop in (1, 3, 4, 5):
            again = build(config_of(comm, **options), world, precision="bf16")
            again.update.applied = stop + 1
            again.sync.load(reading(states[stop]))
            for number in range(stop + 1, 8):
                everywhere(comm, step(again, number) == courses[number], f"stopped after {stop + 1}, step {number}")
            everywhere(comm, np.array_equal(weights(again), weights(whole)), f"stopped after {stop + 1}")
        alone = build(config_of(comm, **options), world.alone())
        alone.sync.load(reading(states[4]))
        everywhere(comm, comm.size == 1 or np.array_equal(weights(alone), weights_of(states[4], alone)))
        world.comm.Barrier()


@pytest.mark.slow
def test_files_bring_back_what_was_on_its_way(comm, tmp_path_all):
    """As many fragments go on at the same bits; others, of which some parameters travelled and some did not, near them.
    """
    config = config_of(comm, every=4, fragments=3, outer_lr=0.7, outer_momentum=0.9)
    shape = assemble.shape_of(config, VOCAB)
    with session() as world:
        whole = build(config, world)
        for number in range(2):
            step(whole, number)
        everywhere(comm, 0 < len(whole.sync.travelling) < len(whole.sync.buckets))
        save(whole, shape, tmp_path_all, 2)
        expected = [step(whole, number) for number in range(2, 6)]
        for fragments in (3, 2, 0):
            config.sync.fragments = fragments
            again = build(config, world)
            assemble.restore(again, shape, config, newest(tmp_path_all, again.mesh.comm))
            found = [step(again, number) for number in range(2, 6)]
            near = np.allclose([loss for loss, _ in found], [loss for loss, _ in expected], rtol=0.03)
            everywhere(comm, found == expected if fragments == 3 else near,
                       f"{fragments} fragments: {found} instead of {expected}")
        world.comm.Barrier()


def test_who_is_to_stay_together_longer_comes_together_first(comm, tmp_path_all):
    """Gradients are summed from there on, of the same weights; and a checkpoint has what all have."""
    with session() as world:
        config = config_of(comm, every=9)
        shape = assemble.shape_of(config, VOCAB)
        apart = build(config, world)
        for number in range(3):
            step(apart, number)
        save(apart, shape, tmp_path_all, 3)
        of_first = comm.bcast(weights(apart))
        everywhere(comm, comm.rank == 0 or not np.array_equal(of_first, weights(apart)), "they have not parted")
        config.sync.local_after = 6
        together = build(config, world)
        assemble.restore(together, shape, config, newest(tmp_path_all, together.mesh.comm))
        for number in range(3, 6):
            same_everywhere(comm, weights(together))
            state = saved(together, comm)
            everywhere(comm, np.array_equal(weights(together), weights_of(state, together)), f"before step {number}")
            step(together, number)
        world.comm.Barrier()


def reading(state):
    """Of a checkpoint that has no other states than those of `state`."""
    def read(name, parameter, start, count):
        values = state.get((name, parameter))
        return np.zeros(count, np.float32) if values is None else values[start:start + count]
    return read


def weights_of(state, core):
    """What a checkpoint says of a rank's parameters."""
    return np.concatenate([state["model", name] for name in core.parameters()])


def test_a_switch_after_a_resume_begins_at_what_was_read(comm):
    """A checkpoint of the steps before the switch does not remember an older anchor."""
    with session() as world:
        first = build(config_of(comm, every=2, local_after=9), world)
        for number in range(2):
            step(first, number)
        state = saved(first, comm)
        held = weights(first).copy()
        other = build(config_of(comm, every=1), world)
        other.sync.load(reading(state))
        other.update.applied, other.update.lr = 2, 0.0
        other.pipeline.run(batch_of(other, 2))
        other.sync.step(other.update)
        everywhere(comm, np.allclose(weights(other), held, rtol=0, atol=1e-6), "a step of length 0 stays there")
        world.comm.Barrier()
