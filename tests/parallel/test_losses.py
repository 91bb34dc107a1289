"""Losses are waited for when somebody looks at them, and not before."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from mpilm import assemble
from mpilm.comm.devices.host import Host
from mpilm.launch import session
from mpilm.parallel.losses import SlotLosses
from tests.comm.late import Late
from tests.helpers import everywhere
from tests.training_cases import VOCAB, arithmetic, batch_of, configuration

DELAY_S = 0.02


class Watched(Host):
    """Tells which events were waited for."""

    def __init__(self):
        self.recorded, self.waited = 0, []

    def record(self):
        self.recorded += 1
        return self.recorded

    def wait(self, event):
        self.waited.append(event)


@pytest.mark.serial
def test_slots_of_others_have_none():
    watched = Watched()
    losses = SlotLosses({2: torch.tensor(0.5), 0: torch.tensor(1.5)}, 4, watched)
    assert watched.waited == []
    np.testing.assert_array_equal(losses, [1.5, 0, 0.5, 0])
    assert watched.waited == [1]
    assert np.asarray(SlotLosses({}, 3, watched)).tolist() == [0, 0, 0]


def test_a_step_waits_once_for_them(comm):
    """When the mean is wanted."""
    config = configuration(collective="shared")
    with session() as world:
        core = assemble.build(config, world, assemble.shape_of(config, VOCAB), arithmetic(config))
        assemble.restore(core, assemble.shape_of(config, VOCAB), config, None)
        watched = core.pipeline.device = Watched()
        mine = core.pipeline.run(batch_of(core))
        core.update.begin(0)
        core.sync.step(core.update)
        everywhere(comm, watched.waited == [])
        loss = core.losses.mean(mine)
        everywhere(comm, watched.waited == [watched.recorded] and 4 < loss < 6, f"{watched.waited}, {loss}")
        world.comm.Barrier()


@pytest.mark.serial
@pytest.mark.parametrize("immediate", [False, True])
def test_a_device_s_own_clock(immediate):
    """Of when things happened, not of when they were asked for."""
    late = Late(seed=3, immediate=immediate)
    array = late.zeros(4, np.float32)
    first = late.stamp()
    late.put(lambda: time.sleep(DELAY_S))
    np.add(array, 1, out=array)
    last = late.stamp()
    assert late.elapsed(first, last) >= DELAY_S
    late.wait(last)
    assert late.happened(last)
    assert Host().elapsed(1.0, 3.5) == 2.5
