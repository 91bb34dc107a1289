"""What needs another number of ranks than the suite's: 5 to 8 of them, and a buffer beyond 2^31 bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mpilm.startup import MALLOC
from tests.helpers import REPOSITORY, Result

# More ranks than cores: whoever waits inside MPI should let the others run.
YIELDING = {"OMPI_MCA_mpi_yield_when_idle": "1", "MPIR_CVAR_POLLS_BEFORE_YIELD": "1"}

PROGRAM = """
import numpy as np
from mpi4py import MPI
from mpilm.comm import collectives, order, p2p
from mpilm.comm.node import Node
from tests.comm import cases
from tests.helpers import everywhere, same_everywhere

def check(comm, collective, name, reproducible, count, dtype):
    for buffer in (collective.allocate(count, dtype), np.empty(count, dtype)):
        buffer[:] = cases.values(comm.rank, count, dtype)
        collective.allreduce(buffer)
        wanted = cases.expected(comm.size, count, dtype)
        everywhere(comm, cases.close(buffer, wanted, comm.size), f"{name} {count}")
        same_everywhere(comm, buffer)
        ordered = cases.in_tree_order(comm.size, count, dtype)
        everywhere(comm, not reproducible or (buffer == ordered).all(), f"{name} {count}: order")
        buffer[:] = cases.values(comm.rank, count, dtype)
        comm.Barrier()
        collective.reduce_scatter(buffer)
        own = order.segments(count, comm.size)[comm.rank]
        everywhere(comm, cases.close(buffer[own], wanted[own], comm.size), f"{name} {count}: mine")
        everywhere(comm, not reproducible or (buffer[own] == ordered[own]).all(), f"{name} {count}: order")
    for buffer in (collective.allocate_common(count, dtype), np.zeros(count, dtype)):
        buffer[own] = 1 + comm.rank
        collective.allgather(buffer)
        whole = [np.full(cut.stop - cut.start, 1 + rank, dtype)
                 for rank, cut in enumerate(order.segments(count, comm.size))]
        everywhere(comm, (buffer == np.concatenate(whole)).all(), f"{name} {count}: gathered")

def check_all(comm, ranks_per_node):
    node = Node.build(comm, ranks_per_node=ranks_per_node)
    for name in collectives.names():
        for reproducible in (False, True):
            collective = cases.build(name, comm, node, reproducible=reproducible)
            for count, dtype in ((3, "int64"), (999, "float64"), (150_001, "float32")) if collective else ():
                check(comm, collective, name, reproducible, count, dtype)

for size, ranks_per_node in ((5, 3), (6, 0), (7, 0), (8, 0), (8, 3)):
    part = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank < size)
    if part.size == size:
        check_all(part, ranks_per_node)
    through = MPI.COMM_WORLD.Ibarrier()
    p2p.until(lambda: through.Test() or None)
print("summed", flush=True)
"""

LARGE = """
import numpy as np
from mpi4py import MPI
from mpilm.comm import collectives
from mpilm.comm.node import Node
from mpilm.comm.transport import ON_HOST
comm = MPI.COMM_WORLD
node = Node.build(comm)
made = {name: collectives.get(name)(comm, node) for name in collectives.names()
        if not collectives.get(name).lacks(ON_HOST)}
count = 2**29 + 12_345
buffer = made["shared"].allocate(count, np.float32)     # for all of them: this much memory takes longer than its sum
assert buffer.nbytes > 2**31
touched = [slice(0, 99), slice(2**28 - 99, 2**28 + 99), slice(2**29 - 99, 2**29 + 99), slice(count - 99, count)]
for name, collective in made.items():
    for number, part in enumerate(touched):
        buffer[part] = number + comm.rank
    collective.allreduce(buffer)
    for number, part in enumerate(touched):
        assert (buffer[part] == 2 * number + 1).all(), (name, number)
    assert not buffer[2**28 + 99 : 2**29 - 99 : 4999].any(), name
del buffer
for collective in made.values():
    collective.free()
print("summed", flush=True)
"""


@pytest.mark.serial
@pytest.mark.slow
def test_more_ranks(run_mpi: Callable[..., Result]) -> None:
    result = run_mpi(8, ["-c", PROGRAM], cwd=REPOSITORY, timeout=180, env=YIELDING)
    assert result.rc == 0, result.stderr
    assert result.stdout.count("summed") == 8


@pytest.mark.serial
@pytest.mark.slow
def test_beyond_two_to_the_31_bytes(run_mpi: Callable[..., Result]) -> None:
    result = run_mpi(2, ["-c", LARGE], cwd=REPOSITORY, timeout=300, env={"GLIBC_TUNABLES": MALLOC})
    assert result.rc == 0, result.stderr
    assert result.stdout.count("summed") == 2
