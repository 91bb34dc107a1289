"""What a server is timed with: every update is made of what all workers have sent for it."""

import time

import pytest

from mpilm.bench._serving import MANY, Emulation
from mpilm.comm.order import BLOCK
from tests.helpers import everywhere

COUNT = 2 * MANY * BLOCK


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("ranks_per_node", ["0", "1"])
def test_an_update_is_made_of_what_all_have_sent(ranks_per_node, comm, monkeypatch):
    """By messages too, and if workers are late."""
    monkeypatch.setenv("MPILM_RANKS_PER_NODE", ranks_per_node)
    emulation, norms = Emulation(comm, COUNT), []
    for step in range(1, 4):
        if emulation.server is None:
            time.sleep(0.02)
            for bucket in emulation.sync.buckets:
                bucket.outgoing.fill(step)
        emulation.step()
        if emulation.server is not None:
            norms.append(emulation.server.grad_norm)
    if emulation.server is not None:
        assert norms == pytest.approx([(comm.size - 1) * step * COUNT ** 0.5 for step in range(1, 4)])
    emulation.free()
    everywhere(comm, emulation.server is None or len(norms) == 3)
