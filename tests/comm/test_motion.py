"""Whether a message moves is told by how long looks for it take."""

from __future__ import annotations

import time

import numpy as np
import pytest
from mpi4py import MPI

from mpilm.comm import p2p
from mpilm.comm.motion import WINDOW, Motion
from tests.helpers import everywhere

IDLE, COLD, MOVING = 0.5e-6, 17e-6, 25e-6


class Looks:
    """A clock by which looks take so long, one after the other, and what they find."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.now, self.done = list(seconds), 0.0, 0

    def clock(self) -> float:
        return self.now

    def look(self) -> bool | None:
        self.now += self.seconds[min(self.done, len(self.seconds) - 1)]
        self.done += 1
        return True if self.done > len(self.seconds) else None


def motion(looks: Looks, times: int, naps: tuple[int, ...] = ()) -> Motion:
    found = Motion(looks.clock)
    for time_ in range(times):
        if time_ in naps:
            found.napped()
        found.look(looks.look)
    return found


@pytest.mark.serial
def test_looks_that_find_nothing_are_no_motion() -> None:
    """Nor are some that were interrupted."""
    assert not motion(Looks(*[IDLE] * 100), 50).seen
    assert not motion(Looks(*[IDLE, IDLE, MOVING, IDLE, IDLE, MOVING] * 20), 50).seen


@pytest.mark.serial
def test_looks_that_take_longer_are_motion() -> None:
    """Though some in between find nothing, and however fast the machine is."""
    looks = [*[IDLE] * 20, *[MOVING, MOVING, IDLE] * 20]
    assert motion(Looks(*looks), 40).seen
    assert motion(Looks(*(10 * seconds for seconds in looks)), 40).seen
    assert not motion(Looks(*[IDLE] * 20, *[MOVING] * 3, *[IDLE] * 20), 30).seen


@pytest.mark.serial
def test_the_first_look_after_a_nap_is_not_counted() -> None:
    """It takes a window of them, at once."""
    looks = Looks(*[COLD, *[IDLE] * WINDOW] * 3)
    assert not motion(looks, 3, naps=(1, 2)).seen
    assert looks.done == 3 * (WINDOW + 1)


@pytest.mark.serial
def test_what_is_found_is_told_at_once() -> None:
    """In the middle of a window."""
    looks = Looks(IDLE, IDLE)
    assert Motion(looks.clock).look(looks.look) is True
    assert looks.done == 3


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("megabytes", [0, 8])
def test_a_wait_ends_when_a_late_message_is_there(megabytes: int, comm: MPI.Comm) -> None:
    """Of any length."""
    sent, landed = np.full(megabytes << 20 or 8, 7, np.uint8), np.zeros(megabytes << 20 or 8, np.uint8)
    comm.Barrier()
    ledger = p2p.Ledger()
    ledger.receive(comm, landed, source=(comm.rank - 1) % comm.size, tag=p2p.TAG_TRIED)
    if comm.rank == 0:
        time.sleep(0.3)
    ledger.send(comm, sent, dest=(comm.rank + 1) % comm.size, tag=p2p.TAG_TRIED)
    ledger.wait()
    everywhere(comm, bool((landed == 7).all()), "the message")
