"""The late device makes mistakes show: without an event, or without settling before MPI, sums are wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from mpi4py import MPI

from mpilm.comm import arrays, order, p2p
from mpilm.comm.collectives import get
from mpilm.comm.node import Node
from mpilm.comm.transport import Direct, Staged, Transport
from mpilm.comm.worker import Worker
from tests.comm import cases
from tests.comm.late import Late, LateSignal
from tests.helpers import everywhere

COUNT, TURNS = 40_000, 30


def sums_are_right(comm: MPI.Comm, name: str, transport: Transport) -> bool:
    """Whether every one of many sums is, on all ranks."""
    node = Node.build(comm)
    collective = get(name)(comm, node, transport=transport)
    buffer, right = collective.allocate(COUNT, np.float32), True
    for turn in range(TURNS):
        np.add(buffer, 1, out=buffer)
        buffer[:] = np.full(COUNT, turn + comm.rank, np.float32)
        collective.allreduce(buffer)
        np.multiply(buffer, 2, out=buffer)
        wanted = 2 * (comm.size * turn + sum(range(comm.size)))
        right &= bool((arrays.fetch(buffer) == wanted).all())
        comm.Barrier()
    collective.free()
    node.free()
    return comm.allreduce(right, op=MPI.LAND)


def never(device: Late) -> None:
    device.settle = p2p.nothing


def follows_nothing(device: Late) -> None:
    device.follow = lambda event: None


def has_always_happened(device: Late) -> None:
    device.happened = lambda event: True


@pytest.mark.turns(at=(3, 4))
@pytest.mark.ranks(min=2)
@pytest.mark.parametrize(("name", "transport", "forget"), [
    ("ring", Direct, never),
    ("tree", Direct, never),
    ("mpi", Direct, never),
    ("ring", Staged, follows_nothing),
    ("ring", Staged, has_always_happened),
])
def test_what_is_forgotten_shows(
    comm: MPI.Comm, name: str, transport: type[Transport], forget: Callable[[Late], None]
) -> None:
    if name == "tree" and comm.size & (comm.size - 1):
        pytest.skip("no power of two of ranks")
    assert sums_are_right(comm, name, transport(Late(comm.rank)))
    late = Late(comm.rank)
    forget(late)
    everywhere(comm, not sums_are_right(comm, name, transport(late)), "sums are right for all that")


@pytest.mark.ranks(min=2)
def test_a_meeting_that_nobody_follows_shows(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sums_are_right(comm, "shared", Direct(Late(comm.rank)))
    monkeypatch.setattr(LateSignal, "follow", lambda *_: None)
    everywhere(comm, not sums_are_right(comm, "shared", Direct(Late(comm.rank))), "sums are right for all that")


@pytest.mark.ranks(min=2)
def test_without_shared_events_a_meeting_settles(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Late, "signal", lambda self: None)
    assert sums_are_right(comm, "shared", Direct(Late(comm.rank)))
    late = Late(comm.rank)
    never(late)
    everywhere(comm, not sums_are_right(comm, "shared", Direct(late)), "sums are right for all that")


def through_a_thread(late: Late) -> bool:
    """Whether a thread finds what was queued before, and is found done by what is queued after."""
    worker, right = Worker("test", late), True
    values = late.zeros(COUNT, np.float32)
    for turn in range(TURNS):
        values[:] = np.full(COUNT, turn, np.float32)
        worker.until(worker.submit(lambda: np.add(values, 1, out=values)))
        np.multiply(values, 2, out=values)
        right &= bool((arrays.fetch(values) == 2 * (turn + 1)).all())
    worker.close()
    return right


@pytest.mark.serial
def test_a_thread_works_on_a_stream_of_its_own() -> None:
    assert through_a_thread(Late())
    late = Late()
    follows_nothing(late)
    assert not through_a_thread(late)


@pytest.mark.serial
def test_nothing_of_a_device_is_seen_by_chance() -> None:
    late = Late()
    values = late.zeros(3, np.float32)
    with pytest.raises(TypeError, match="can't look"):
        np.asarray(values)
    with pytest.raises(TypeError, match="one by one"):
        values[0]


@pytest.mark.turns(at=(3, 4))
@pytest.mark.parametrize("how", [Direct, Staged])
@pytest.mark.parametrize("reproducible", [False, True], ids=["fast", "reproducible"])
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_shared_over_nodes(comm: MPI.Comm, ranks_per_node: int, reproducible: bool, how: type[Transport]) -> None:
    node, late = Node.build(comm, ranks_per_node=ranks_per_node), Late(comm.rank)
    shared = get("shared")(comm, node, reproducible=reproducible, transport=how(late))
    for count in (7, 70_001, 300_001):
        mine, total = cases.values(comm.rank, count, "float32"), cases.expected(comm.size, count, "float32")
        if reproducible:
            total = cases.in_tree_order(comm.size, count, "float32")
        own = order.segments(count, comm.size)[comm.rank]
        for buffer in (shared.allocate(count, "float32"), late.empty(count, "float32")):
            for sum_up, part in ((shared.allreduce, slice(None)), (shared.reduce, slice(None)),
                                 (shared.reduce_scatter, own)):
                buffer[:] = mine
                sum_up(buffer)
                got = arrays.fetch(buffer[part])
                right = (got == total[part]).all() if reproducible else cases.close(got, total[part], comm.size)
                everywhere(comm, right, f"{sum_up.__name__} of {count}")
    shared.free()
    node.free()
