"""Training with shared sequences: three steps against the one-rank run, alone and together with the other axes."""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import ExitStack

import numpy as np
import pytest

from mpilm import assemble
from mpilm.arithmetic import Arithmetic
from mpilm.config import Config
from mpilm.launch import session
from tests import datasets
from tests.helpers import everywhere, same_everywhere
from tests.training_cases import LENGTH, VOCAB, alone, apart, configuration, parallel, same, train

LARGEST = 1e-5      # relative difference from the one-rank run in float32


def layouts(comm):
    """Every (pp, cp) that fits, cp 1 left out where there is another."""
    sizes = [size for size in range(1, comm.size + 1) if comm.size % size == 0]
    return [(pp, cp) for pp, cp in itertools.product(sizes, sizes)
            if comm.size % (pp * cp) == 0 and (cp > 1 or comm.size == 1)]


def test_steps_are_those_of_one_rank(comm):
    """In every layout of replicas, stages and rings; with messages that MPI may not buffer; twice, with the same bits.
    """
    expected = alone(configuration())
    for pp, cp in layouts(comm):
        found = [parallel(configuration(pp=pp, cp=cp), synchronous=synchronous) for synchronous in (False, True)]
        everywhere(comm, apart(found[0], expected) < LARGEST, f"pp {pp}, cp {cp}: {apart(found[0], expected)}")
        everywhere(comm, same(*found), f"pp {pp}, cp {cp}: other bits the second time")
        same_everywhere(comm, np.array(found[0][:2]))
        if pp == 1:
            for value in found[0][2].values():
                same_everywhere(comm, value.numpy())


@pytest.mark.parametrize("options", [{"reproducible": False, "collective": "ring", "micro_batch_size": 2},
                                     {"schedule": "zb", "recompute": True}], ids=["fast", "zb"])
def test_other_orders_of_work(comm, options):
    """Fast mode; split and repeated passes, whose attention goes around the ring again in the backward pass."""
    pp, cp = layouts(comm)[-1]
    expected = alone(configuration(**options))
    found = parallel(configuration(**options, pp=pp, cp=cp))
    everywhere(comm, apart(found, expected) < LARGEST, f"{apart(found, expected)}")


@pytest.mark.ranks(min=4, max=4)
def test_a_pipeline_of_rings_has_the_bits_of_a_ring(comm):
    """Stages change no sum, whatever the number of ranks that share a sequence."""
    with session() as world:
        half = world.owns(dataclasses.replace(world, comm=world.comm.Split(world.rank // 2), rank=world.rank % 2,
                                              size=2, _owned=ExitStack()))
        expected = train(configuration(cp=2), half, precision="bf16")
        world.comm.Barrier()
    for schedule in ("1f1b", "zb"):
        found = parallel(configuration(cp=2, pp=2, schedule=schedule), precision="bf16")
        everywhere(comm, same(expected, found), schedule)


@pytest.fixture
def data(tmp_path_all, comm):
    """One small dataset, for all ranks."""
    return str(datasets.for_all(comm, tmp_path_all))


@pytest.mark.parametrize("documents", [False, True])
def test_validation_has_the_value_of_one_rank(comm, data, documents):
    """Over the same ring as training, with whole micro-batches dealt to the replicas."""
    losses = []
    for cp in (1, comm.size if comm.size < 4 else 2):
        config = configuration(cp=cp)
        config.data.path, config.data.mask_documents, config.log.validation_sequences = data, documents, 10
        losses.append(validation_loss(config))
    everywhere(comm, abs(losses[1] / losses[0] - 1) < LARGEST, str(losses))
    same_everywhere(comm, np.array(losses))


def validation_loss(config: Config) -> float:
    """Of the initial weights."""
    with session() as world:
        shape = assemble.shape_of(config, max(VOCAB, assemble.open_split(config, "validation").vocab_size))
        core = assemble.build(config, world, shape, Arithmetic("fp32", False, 1, 1, True, "", ""))
        assemble.restore(core, shape, config, None)
        loss = assemble.validation(config, core.pipeline, core.mesh.replicas, share=core.mesh.cp.size).loss()
        world.comm.Barrier()
        return loss


def test_the_length_of_these_sequences_fits_every_ring():
    """So that the tests above leave nothing out."""
    assert all(LENGTH % (2 * size) == 0 for size in (1, 2, 3, 4))


@pytest.mark.turns(at=(1, 3))
@pytest.mark.parametrize("level", [1, 2, 3])
def test_memory_divided_over_ranks_that_share_sequences(comm, level):
    """They hold the same parameters, like replicas, and divide them like replicas: three steps of one rank, and at
    level 1 the bits of a ring with whole memory."""
    pp, cp = layouts(comm)[-1]
    options = {"pp": pp, "cp": cp, "collective": "shared"}
    expected = alone(configuration())
    found = parallel(configuration(kind="sharded", level=level, **options))
    everywhere(comm, apart(found, expected) < LARGEST, f"{apart(found, expected)}")
    if level == 1:
        everywhere(comm, same(found, parallel(configuration(**options))), "other bits than allreduce")


@pytest.mark.slow
@pytest.mark.ranks(min=2, max=2)
@pytest.mark.filterwarnings("ignore")     # the compiler warns of its own code
def test_compiled_code_stops_for_the_ring(comm):
    """The parts of a block before and after attention are compiled, also where the block is computed again."""
    found = parallel(configuration(cp=2, recompute=True), compiled=True)
    everywhere(comm, apart(found, alone(configuration())) < LARGEST)
