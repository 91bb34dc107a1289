"""`auto` picks one collective for all ranks, among those that can do what is asked."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI

from mpilm.comm import choose
from mpilm.comm.node import Node
from mpilm.log import UserError


def power_of_two(size: int) -> bool:
    return size & (size - 1) == 0


@pytest.mark.parametrize("reproducible", [False, True])
def test_all_ranks_pick_the_same(comm: MPI.Comm, reproducible: bool) -> None:
    node = Node.build(comm)
    name, seen = choose.measure(comm, node, 50_000, reproducible=reproducible)
    assert len(set(comm.allgather((name, tuple(seen.items()))))) == 1
    fixed_order = {"shared", "tree"} if power_of_two(comm.size) else {"shared"}
    assert set(seen) == (set() if comm.size == 1 else fixed_order if reproducible else {"shared", "ring", "mpi"})
    assert comm.size == 1 or seen[name] == max(seen.values())
    node.free()


def test_auto_says_what_it_picked(comm: MPI.Comm, capfd: pytest.CaptureFixture[str]) -> None:
    node = Node.build(comm)
    collective = choose.build("auto", comm, node, count=1000, reproducible=True)
    told = capfd.readouterr().out
    words = f"allreduce: {collective.name} (GB/s over 0.00381 MiB: shared "
    assert comm.rank > 0 or (words in told) == (comm.size > 1)  # one rank alone has no choice
    collective.free()
    node.free()


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("name", ["shared", "auto"])
def test_shared_gives_way_where_memory_cannot_be_shared(
    comm: MPI.Comm, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    node = Node.build(comm, ways=["/nowhere"])
    collective = choose.build(name, comm, node, count=1000)
    assert collective.name in ("ring", "mpi")
    told = capfd.readouterr().err
    assert comm.rank > 0 or "can share 0 MiB (by /nowhere)" in told
    buffer = np.ones(10)
    collective.allreduce(buffer)
    assert (buffer == comm.size).all()
    collective.free()
    node.free()


@pytest.mark.ranks(min=3, max=3)
def test_nothing_can_keep_the_order(comm: MPI.Comm) -> None:
    node = Node.build(comm, ways=["/nowhere"])
    with pytest.raises(UserError, match=r"power of two of ranks .* 3 do\. Start .*--run\.reproducible false"):
        choose.build("auto", comm, node, count=1000, reproducible=True)
    node.free()


@pytest.mark.ranks(min=3, max=3)
def test_tree_over_three_ranks_names_the_alternatives(comm: MPI.Comm) -> None:
    node = Node.build(comm)
    with pytest.raises(UserError, match=r"power of two of ranks .* 3 do\. Choose --sync\.collective auto"):
        choose.build("tree", comm, node, count=1000)
    node.free()
