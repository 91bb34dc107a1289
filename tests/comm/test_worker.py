"""The communication thread: first in, first out, and no error gets lost."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from mpi4py import MPI

from mpilm.comm import collectives
from mpilm.comm.node import Node
from mpilm.comm.transport import ON_HOST
from mpilm.comm.worker import Worker
from tests.helpers import everywhere


def test_in_order_in_one_other_thread() -> None:
    worker, seen = Worker("test"), []
    for number in range(100):
        worker.submit(lambda number=number: seen.append((number, threading.current_thread().name)))
    worker.wait()
    worker.close()
    assert seen == [(number, "test") for number in range(100)]


def test_a_future_holds_the_result() -> None:
    worker = Worker("test")
    assert worker.submit(divmod, 7, 2).result() == (3, 1)
    worker.close()


def test_wait_raises_the_first_error_and_the_rest_is_not_run() -> None:
    worker, seen = Worker("test"), []
    worker.submit(seen.append, 1)
    worker.submit(int, "no number")
    worker.submit(seen.append, 2)
    with pytest.raises(ValueError, match="no number"):
        worker.wait()
    worker.submit(seen.append, 3)
    with pytest.raises(ValueError, match="no number"):
        worker.wait()
    worker.close()
    assert seen == [1]


def test_wait_with_nothing_to_do() -> None:
    worker = Worker("test")
    worker.wait()
    worker.close()


def _able(name: str, size: int) -> bool:
    collective = collectives.get(name)
    return collective.why_not(size) is None and collective.lacks(ON_HOST) is None


@pytest.mark.parametrize("name", collectives.names())
def test_sums_while_the_main_thread_computes(comm: MPI.Comm, name: str) -> None:
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED or not _able(name, comm.size):
        pytest.skip("not here")
    node, worker = Node.build(comm), Worker("test")
    collective = collectives.get(name)(comm, node)
    buckets = [collective.allocate(100_000, np.float32) for _ in range(8)]
    for bucket in buckets:
        bucket[:] = comm.rank + 1
        worker.submit(collective.reduce, bucket)
    matrix = np.ones((200, 200))
    for _ in range(10):
        matrix = matrix @ matrix / 200
    worker.wait()
    worker.close()
    everywhere(comm, all(bucket[:1].sum() >= 1 for bucket in buckets) and bool((matrix == 1).all()))
    collective.free()
    node.free()
