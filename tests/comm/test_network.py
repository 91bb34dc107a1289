"""The emulated line: who leaves when, by a clock of the test's own; and sums and pipelines over it."""

from __future__ import annotations

import numpy as np
import pytest

from mpilm.comm import collectives, network
from mpilm.comm.network import Line
from mpilm.comm.node import Node
from mpilm.log import UserError
from tests.helpers import everywhere
from tests.training_cases import configuration, parallel


@pytest.mark.serial
def test_messages_leave_one_after_the_other_and_arrive_a_latency_later():
    """A Mbit is 125,000 bytes; the line is free again when the last one has left, not when it has arrived."""
    now, seen = [0.0], []
    line = Line(mbit_s=1.0, latency_ms=500.0, clock=lambda: now[0])
    for name, nbytes in (("a", 125_000), ("b", 250_000), ("c", 0)):
        line.carry(nbytes, lambda name=name: seen.append(name))
    found = {}
    for tenth in range(50):
        now[0] = tenth / 10 + 1e-6
        line.hand_over()
        found |= {name: tenth / 10 for name in seen if name not in found}
    assert found == {"a": 1.5, "b": 3.5, "c": 3.5}
    line.carry(125_000, lambda: seen.append("d"))
    now[0] = 6.0
    line.hand_over()
    assert seen == ["a", "b", "c"]
    now[0] = 6.41
    line.hand_over()
    assert seen[-1] == "d", "an idle line begins when it is given something"


@pytest.mark.serial
def test_what_a_world_had_under_way_ends_with_it():
    """MPI would be given a message of a communicator that is gone, by whoever waits in the next world."""
    now, seen = [0.0], []
    line = Line(mbit_s=1.0, latency_ms=500.0, clock=lambda: now[0])
    line.carry(1_250_000, lambda: seen.append("old"))
    line.drop()
    line.carry(125_000, lambda: seen.append("new"))
    now[0] = 100.0
    line.hand_over()
    assert seen == ["new"]
    now[0] = 101.0
    line.carry(0, lambda: seen.append("late"))
    now[0] = 101.5001
    line.hand_over()
    assert seen == ["new", "late"], "the line was free"


@pytest.mark.serial
def test_without_emulation_messages_go_at_once():
    """They are not even queued."""
    seen = []
    network.from_text("").carry(1 << 30, lambda: seen.append(1))
    assert seen == [1]


@pytest.mark.serial
@pytest.mark.parametrize("text", ["100", "fast:1", "0:1", "-5:1", "100:-1", "nan:1", "100:inf", "1:2:3"])
def test_what_is_no_network_is_refused(text):
    """With what would be one."""
    with pytest.raises(UserError, match="such as 100:1"):
        network.from_text(text)


@pytest.mark.parametrize("name", ["ring", "shared", "mpi"])
def test_sums_over_a_slow_line_are_right_and_keep_it_busy(name, comm, monkeypatch):
    """Every rank a node of its own; every byte that is counted went by the line."""
    monkeypatch.setenv("MPILM_RANKS_PER_NODE", "1")
    node, line = Node.build(comm), Counting()
    collective = collectives.get(name)(comm, node)
    with network.emulated(line):
        buffer = np.full(100_001, comm.rank + 1, np.float32)
        collective.allreduce(buffer)
    everywhere(comm, bool((buffer == comm.size * (comm.size + 1) / 2).all()), "the sum")
    everywhere(comm, (line.carried > 0) == (comm.size > 1), f"{line.carried} bytes")
    collective.free()
    node.free()


class Counting(Line):
    """A line of 8 Gbit/s that knows what it was given."""

    def __init__(self):
        super().__init__(8000.0, 0.1)
        self.carried = 0

    def seconds(self, nbytes):
        self.carried += nbytes
        return super().seconds(nbytes)


def test_a_pipeline_over_a_slow_line_has_the_same_bits(comm):
    """Messages of two threads share it, and nobody waits for what another one has to deliver."""
    config = configuration("ring", reproducible=False, pp=2 - comm.size % 2)
    expected = parallel(config)
    with network.emulated(Line(1000.0, 0.5)):
        found = parallel(config)
    everywhere(comm, found[:2] == expected[:2], f"{found[0]} {expected[0]}")
