"""Training with shared layers: three steps against the one-rank run, alone and together with the other axes."""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import ExitStack

import numpy as np
import pytest

from mpilm import assemble
from mpilm.checkpoint import newest
from mpilm.launch import session
from mpilm.model.slices import Slices
from mpilm.state import TrainState
from tests import datasets
from tests.helpers import everywhere, same_everywhere
from tests.parallel.test_context_checkpoints import save
from tests.parallel.test_context_training import validation_loss
from tests.parallel.test_tensor import mine as of_team
from tests.sync.test_resharding import step
from tests.training_cases import DIVISIBLE, alone, apart, build, divisible, parallel, same
from tests.training_cases import train as train_on

LARGEST = 1e-5      # relative difference from the one-rank run in float32


def mine(expected, config, rank, size):
    """What a rank of a team holds of the weights of one rank."""
    slices = Slices(assemble.shape_of(config, DIVISIBLE["vocab_size"]), rank, size)
    weights = {name: of_team(value, slices, name) for name, value in expected[2].items()}
    return expected[0], expected[1], weights


def train(config, **options):
    """Steps on all ranks: (losses, norms, my weights, flat), and my place in the team."""
    losses, norms, weights = parallel(config, **options)
    return losses, norms, {name: value.flatten() for name, value in weights.items()}


def layouts(comm):
    """Every (pp, tp) that fits, tp 1 left out where there is another."""
    sizes = [size for size in range(1, comm.size + 1) if comm.size % size == 0]
    return [(pp, tp) for pp, tp in itertools.product(sizes, sizes)
            if comm.size % (pp * tp) == 0 and (tp > 1 or comm.size == 1)]


def test_steps_are_those_of_one_rank(comm):
    """In every layout of replicas, stages and teams, twice, with the same bits."""
    expected = alone(divisible())
    for pp, tp in layouts(comm):
        config = divisible(pp=pp, tp=tp)
        found = [train(config) for _ in range(2)]
        difference = apart(found[0], mine(expected, config, comm.rank % tp, tp))
        everywhere(comm, difference < LARGEST, f"pp {pp}, tp {tp}: {difference}")
        everywhere(comm, same(*found), f"pp {pp}, tp {tp}: other bits the second time")
        same_everywhere(comm, np.array(found[0][:2]))


@pytest.mark.turns(at=(1, 3))
@pytest.mark.parametrize("options", [
    {"reproducible": False, "collective": "ring", "micro_batch_size": 2}, {"recompute": True}, {"tied": True},
    *({"kind": "sharded", "level": level, "collective": "shared"} for level in (1, 2, 3))],
    ids=["fast", "recompute", "tied", "level 1", "level 2", "level 3"])
def test_together_with_other_options(comm, options):
    """The layers of all ranks, or of two."""
    tp = comm.size if comm.size < 4 else 2
    expected = alone(divisible(**{key: value for key, value in options.items() if key not in ("kind", "level")}))
    config = divisible(**options, tp=tp)
    found = train(config)
    difference = apart(found, mine(expected, config, comm.rank % tp, tp))
    everywhere(comm, difference < LARGEST, f"{difference}")


def test_the_norm_is_that_of_one_rank_whatever_holds_what(comm):
    """What all ranks of a team hold is counted once: a norm that is never clipped would not show it in the weights."""
    expected = alone(divisible(clip=0.05))
    found = train(divisible(clip=0.05, tp=comm.size))
    everywhere(comm, np.allclose(found[1], expected[1], rtol=LARGEST), f"{found[1]}, not {expected[1]}")


@pytest.mark.ranks(min=4, max=4)
def test_rings_of_teams(comm):
    """Ranks that share sequences, and each of these layers."""
    expected = alone(divisible())
    config = divisible(cp=2, tp=2)
    found = train(config)
    everywhere(comm, apart(found, mine(expected, config, comm.rank % 2, 2)) < LARGEST)


@pytest.mark.ranks(min=4, max=4)
def test_replicas_that_train_by_themselves_may_be_teams(comm):
    """Two of them, averaged after every second of three steps: as two replicas of one rank each."""
    def local(**options):
        config = divisible(reproducible=False, **options)
        config.sync.kind, config.sync.every = "local_sgd", 2
        return config

    with session() as world:
        pair = world.owns(dataclasses.replace(world, comm=world.comm.Split(world.rank % 2), rank=world.rank // 2,
                                              size=2, _owned=ExitStack()))
        expected = train_on(local(), pair, precision="fp32")
        world.comm.Barrier()
    found = train(local(tp=2))
    difference = apart(found, mine(expected, local(), comm.rank % 2, 2))
    everywhere(comm, difference < LARGEST, f"{difference}")


@pytest.mark.slow
@pytest.mark.ranks(min=2, max=2)
@pytest.mark.filterwarnings("ignore")     # the compiler warns of its own code
def test_compiled_code_goes_on_through_exchanges(comm):
    """Also where the block is computed again."""
    config = divisible(tp=2, recompute=True)
    found = train(config, compiled=True)
    everywhere(comm, apart(found, mine(alone(divisible()), config, comm.rank, 2)) < LARGEST)


def test_validation_has_the_value_of_one_rank(comm, tmp_path_all):
    """Over the same teams as training."""
    data = str(datasets.for_all(comm, tmp_path_all))
    losses = []
    for tp in (1, comm.size):
        config = divisible(tp=tp)
        config.model.vocab_size = 24 * -(-datasets.VOCAB_SIZE // 24)
        config.data.path, config.log.validation_sequences = data, 10
        losses.append(validation_loss(config))
    everywhere(comm, abs(losses[1] / losses[0] - 1) < LARGEST, str(losses))
    same_everywhere(comm, np.array(losses))


def test_teams_of_any_size_go_on_from_each_other(comm, tmp_path_all):
    """A team of all ranks, none, and a team again with memory divided, a step each: the checkpoint of a step has the
    same tensors whoever wrote it, and the steps are those of one undisturbed rank."""
    teams = [comm.size, 1, comm.size]
    expected, vocab = alone(divisible(steps=len(teams))), DIVISIBLE["vocab_size"]
    losses, norms = [], []
    with session() as world:
        for number, tp in enumerate(teams):
            config = divisible(tp=tp, collective="shared", kind="sharded" if number == 2 else "allreduce",
                               steps=len(teams))
            core, shape = build(config, world), assemble.shape_of(config, vocab)
            if number:
                reader = newest(tmp_path_all, core.mesh.comm)
                state = assemble.restore(core, shape, config, reader)
                everywhere(comm, state == TrainState(step=number, applied=number))
                written = whole(reader, shape)
                save(core, shape, tmp_path_all / f"again-{number}", number)
                again = whole(newest(tmp_path_all / f"again-{number}", core.mesh.comm), shape)
                everywhere(comm, all(np.array_equal(written[name], again[name]) for name in written), f"tp {tp}")
            loss, norm = step(core, number)
            losses.append(loss)
            norms.append(norm)
            save(core, shape, tmp_path_all, number + 1)
        np.testing.assert_allclose([losses, norms], expected[:2], rtol=LARGEST)
        world.comm.Barrier()


def whole(reader, shape):
    """Every tensor of a checkpoint, weights and states."""
    names = [f"{state}.{tensor}" for state in ("model", "adam_m", "adam_v") for tensor in shape.tensors()]
    counts = [int(np.prod(dimensions)) for dimensions in shape.tensors().values()] * 3
    return {name: reader.read(name, 0, count) for name, count in zip(names, counts, strict=True)}
