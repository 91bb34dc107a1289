"""Checkpoints do not know who shared the sequences: any ring resumes what any other saved, with every bit."""

from __future__ import annotations

import numpy as np

from mpilm import assemble
from mpilm.checkpoint import Writer, newest
from mpilm.launch import session
from mpilm.state import TrainState, describe, pieces
from tests.helpers import everywhere
from tests.sync.test_resharding import saved, step
from tests.training_cases import VOCAB, alone, build, configuration


def save(core, shape, directory, number):
    """A checkpoint after so many steps."""
    replicas = core.mesh.replicas
    writer = Writer(directory, core.mesh.comm)
    writer.save(number, list(pieces(core.slices(shape), core.sync.runs(replicas.rank, replicas.size))),
                describe(TrainState(step=number, applied=core.update.applied), {}))
    writer.wait()


def test_rings_of_any_size_go_on_from_each_other(comm, tmp_path_all):
    """A ring of all ranks, none, and a ring again, a step each: what is read are the bits that were written, weights
    and optimizer state; and the steps are those of one undisturbed rank."""
    rings = [comm.size, 1, comm.size]
    expected = alone(configuration(steps=len(rings)))
    losses, norms, written = [], [], {}
    with session() as world:
        for number, cp in enumerate(rings):
            config = configuration(cp=cp, collective="shared", steps=len(rings))
            core, shape = build(config, world), assemble.shape_of(config, VOCAB)
            if number:
                state = assemble.restore(core, shape, config, newest(tmp_path_all, core.mesh.comm))
                everywhere(comm, state == TrainState(step=number, applied=number))
                read = saved(core, comm)
                everywhere(comm, read.keys() == written.keys() and all(
                    np.array_equal(read[key], values) for key, values in written.items()), f"cp {cp}")
            loss, norm = step(core, number)
            losses.append(loss)
            norms.append(norm)
            written = saved(core, comm)
            save(core, shape, tmp_path_all, number + 1)
        np.testing.assert_allclose([losses, norms], expected[:2], rtol=1e-5)
        world.comm.Barrier()
