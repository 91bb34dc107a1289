"""Looking for messages."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mpilm.comm import p2p
from tests.helpers import everywhere

MANY = 20


@pytest.mark.ranks(min=2)
def test_all_that_have_come_are_seen_though_nobody_called_mpi_meanwhile(comm, tmp_path_all):
    """A file says that they are there."""
    sent, found = tmp_path_all / "sent", []
    if comm.rank == 1:
        requests = [comm.Isend(np.array([number]), dest=0, tag=number % 2) for number in range(MANY)]
        sent.touch()
        p2p.wait(requests)
    if comm.rank == 0:
        while not sent.exists():
            time.sleep(0.001)
        told = np.empty(1, int)
        while p2p.has_come(comm):
            comm.Recv(told)
            found.append(int(told[0]))
    everywhere(comm, found == (list(range(MANY)) if comm.rank == 0 else []), str(found))
