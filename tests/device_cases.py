"""Training steps whose buckets are on another device than the host's."""

from __future__ import annotations

from mpilm import assemble
from mpilm.comm.transport import Transport
from mpilm.config import Config
from mpilm.launch import session
from tests.training_cases import VOCAB, arithmetic, course


def on(transport: Transport, config: Config, precision: str = "fp32") -> tuple[list, list, dict]:
    """Steps over all ranks, with buckets on another device: losses, norms, parameters."""
    with session() as world:
        shape = assemble.shape_of(config, VOCAB)
        core = assemble.build(config, world, shape, arithmetic(config, precision), transport=transport)
        assemble.restore(core, shape, config, None)
        found = course(core, config)
        core.sync.runs(core.mesh.replicas.rank, core.mesh.replicas.size)
        world.comm.Barrier()
        return found
