"""NCCL, as far as that goes without a GPU: whom it refuses, on all ranks, and what to do. The contract has the rest."""

from __future__ import annotations

import pytest
from mpi4py import MPI

from mpilm.comm import collectives
from mpilm.comm.collectives import nccl
from mpilm.comm.node import Node
from mpilm.comm.transport import Direct, Transport
from mpilm.log import UserError
from tests.comm.late import Late


@pytest.mark.parametrize(("transport", "reproducible", "message"), [
    (None, False, r"nccl is for GPUs\. Choose --sync\.collective shared or ring"),
    (Direct, True, r"nccl does not sum in a fixed order.*shared or tree.*--run\.reproducible false"),
    (Direct, False, r"nccl: there is no NCCL on rank 0.*shared or ring"),
])
def test_where_it_cannot(comm: MPI.Comm, transport: type[Transport] | None, reproducible: bool, message: str,
                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_library", lambda: None)
    node, by = Node.build(comm), {} if transport is None else {"transport": transport(Late())}
    with pytest.raises(UserError, match=message):
        collectives.get("nccl")(comm, node, reproducible=reproducible, **by)
    node.free()


@pytest.mark.serial
@pytest.mark.parametrize(("seen", "message"), [
    ([(True, "a"), (True, "b")], ""),
    ([(True, "a"), (False, "b")], "no NCCL on rank 1"),
    ([(True, "a"), (True, "b"), (True, "a")], "a GPU of its own"),
])
def test_who_can_is_told_by_all(seen: list[tuple[bool, str]], message: str) -> None:
    assert message in nccl._problem(seen)
    assert bool(message) == bool(nccl._problem(seen))
