"""`shared` over several (emulated) nodes, on slices of its buffers, and where memory cannot be shared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
from mpi4py import MPI

from mpilm.comm import order
from mpilm.comm.collectives.shared import Shared
from mpilm.comm.node import Node, SharedMemoryError
from mpilm.log import UserError
from tests.comm import cases
from tests.helpers import everywhere, same_everywhere

Watch = Callable[[float], AbstractContextManager[None]]
COUNTS = {"float32": (0, 1, 7, 70_001, 1_100_003), "float64": (1, 70_001), "int64": (7, 30_001)}


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("reproducible", [False, True], ids=["fast", "reproducible"])
@pytest.mark.parametrize("ranks_per_node", [1, 2, 3])
def test_over_nodes(comm: MPI.Comm, ranks_per_node: int, reproducible: bool, dtype: str) -> None:
    node = Node.build(comm, ranks_per_node=ranks_per_node)
    shared = Shared(comm, node, reproducible=reproducible)
    for count in COUNTS[dtype]:
        mine, total = cases.values(comm.rank, count, dtype), cases.expected(comm.size, count, dtype)
        for buffer in (shared.allocate(count, dtype), np.empty(count, dtype)):
            buffer[:] = mine
            shared.allreduce(buffer)
            everywhere(comm, cases.close(buffer, total, comm.size), f"{count}")
            same_everywhere(comm, buffer)
            if reproducible:
                everywhere(comm, (buffer == cases.in_tree_order(comm.size, count, dtype)).all(), f"bits, {count}")
            buffer[:] = mine
            comm.Barrier()
            told, edges = list[np.ndarray](), list[int]()
            shared.reduce(buffer, lambda part, buffer=buffer, told=told, edges=edges: (
                told.append(buffer[part].copy()), edges.append(part.start)))
            own = order.segments(count, shared.owners.size)[shared.owners.rank]
            everywhere(comm, cases.close(buffer[own], total[own], comm.size), f"owned segment, {count}")
            everywhere(comm, np.array_equal(np.concatenate([buffer[:0], *told]), buffer[own]), f"told, {count}")
            everywhere(comm, all((edge - own.start) % order.BLOCK == 0 for edge in edges), f"between blocks, {count}")
            buffer[:] = mine
            comm.Barrier()
            shared.reduce_scatter(buffer)
            own = order.segments(count, comm.size)[comm.rank]
            everywhere(comm, cases.close(buffer[own], total[own], comm.size), f"my segment, {count}")
            if reproducible:
                ordered = cases.in_tree_order(comm.size, count, dtype)[own]
                everywhere(comm, (buffer[own] == ordered).all(), f"bits of my segment, {count}")
        for buffer in (shared.allocate_common(count, dtype), np.zeros(count, dtype)):
            buffer[own] = np.arange(count)[own]
            shared.allgather(buffer)
            everywhere(comm, (buffer == np.arange(count).astype(dtype)).all(), f"gathered, {count}")
    shared.free()
    node.free()


def test_a_slice_of_an_allocation(comm: MPI.Comm) -> None:
    node = Node.build(comm)
    shared = Shared(comm, node)
    whole = shared.allocate(100_000, np.float32)
    whole[:] = comm.rank
    comm.Barrier()
    shared.allreduce(whole[1000:90_001])
    assert (whole[1000:90_001] == sum(range(comm.size))).all()
    assert (whole[:1000] == comm.rank).all()
    assert (whole[90_001:] == comm.rank).all()
    shared.free()
    node.free()


@pytest.mark.ranks(min=2)
def test_ranks_may_give_different_memory(comm: MPI.Comm) -> None:
    """One rank the shared buffer, another its own, another a different slice: it is the values that count."""
    node = Node.build(comm)
    shared = Shared(comm, node)
    whole = shared.allocate(5000, np.float64)
    buffer = [whole[:1000], np.empty(1000), whole[2000:3000]][comm.rank % 3]
    buffer[:] = comm.rank
    comm.Barrier()
    shared.allreduce(buffer)
    assert (buffer == sum(range(comm.size))).all()
    shared.free()
    node.free()


def test_owners_are_the_node(comm: MPI.Comm) -> None:
    node = Node.build(comm, ranks_per_node=2)
    shared = Shared(comm, node)
    assert (shared.owners.size, shared.owners.rank) == (node.comm.size, node.comm.rank)
    shared.free()
    node.free()


@pytest.mark.ranks(min=3)
def test_ranks_dealt_in_turns_to_nodes(comm: MPI.Comm) -> None:
    """mpirun --map-by node: fine where the order is free, refused where it is not."""
    turned = comm.Split(0, key=comm.rank % 2 * comm.size + comm.rank)  # 0 2 4 .. 1 3 ..
    by_two = Node.build(comm, ranks_per_node=2)
    number = turned.rank
    members = tuple(sorted(set(turned.allgather(tuple(by_two.comm.allgather(number))))))
    index = next(place for place, ranks in enumerate(members) if number in ranks)
    node = Node(by_two.comm, by_two.peers, len(members), members, index, by_two.ways)
    with pytest.raises(UserError, match="consecutive"):
        Shared(turned, node, reproducible=True)
    shared = Shared(turned, node)
    buffer = np.full(100, float(number))
    shared.allreduce(buffer)
    assert (buffer == sum(range(comm.size))).all()
    shared.free()
    by_two.free()
    turned.Free()


@pytest.mark.ranks(min=2)
def test_too_little_memory_is_said_and_summed_all_the_same(
    comm: MPI.Comm, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node.build(comm)
    shared = Shared(comm, node)
    refused = Node(node.comm, node.peers, node.num_nodes, node.members, node.index, ("/nowhere",))
    monkeypatch.setattr(shared, "node", refused)
    buffer = shared.allocate(1000, np.float32)
    told = capfd.readouterr().err
    assert comm.rank > 0 or "/nowhere: No such file or directory" in told
    buffer[:] = comm.rank
    shared.allreduce(buffer)
    assert (buffer == sum(range(comm.size))).all()
    shared.free()
    node.free()


@pytest.mark.ranks(min=2)
def test_one_node_without_memory_is_an_error_on_all(comm: MPI.Comm, watch: Watch) -> None:
    node = Node.build(comm, ranks_per_node=2, ways=["/nowhere" if comm.rank < 2 else "memfd"])
    with watch(20), pytest.raises(SharedMemoryError, match="/nowhere"):
        Shared(comm, node)
    node.free()
