"""Allreduce of float32 from 1 to 256 MiB: our collectives, MPI's, Gloo's, and a plain memory copy of the same size.

    mpirun -np 2 python -m mpilm.bench allreduce

Figures are bus bandwidth, bytes / time * 2 (size - 1) / size, as nccl-tests defines it; of the slowest rank, from a
barrier on. "copy" is a copy of the buffer on every rank at once, by the same formula, so that it reads as the speed
at which an allreduce would run that costs as much as a copy. Every contender sums the buffer that it would have in
training: ours what `allocate` gives, the peers ordinary memory, all of them in place, with one thread a rank.

Everything is measured twice: first as people run it, with the malloc that every process has, then ("64MiB kept") in a
process that keeps the memory it frees, as ours does. MPI_Allreduce allocates in every call (see _malloc.py), ours do
not. Figures of the two halves do not compare with each other, for a machine drifts; ratios do.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from mpi4py import MPI

from mpilm.bench._malloc import keep_what_is_freed
from mpilm.bench.measure import busbw, interleaved
from mpilm.comm import arrays, collectives
from mpilm.comm.collectives import Collective
from mpilm.comm.node import Node
from mpilm.log import UserError, warn

OURS = ("ring", "shared", "tree")
SIZES_MIB = (1, 4, 16, 64, 256)
ROUNDS = 15
KEPT = "kept"   # freed memory is
LOOPBACK = "127.0.0.1"
TIMEOUT_S = 120

Emit = Callable[[str, str, float, str], None]
Call = Callable[[], object]


def run(comm: MPI.Comm, emit: Emit) -> None:
    """Measure every size. Collective over `comm`.

    Raises:
        UserError: One rank only.
    """
    if comm.size == 1:
        raise UserError("One rank has nobody to sum with. Start two: mpirun -np 2 python -m mpilm.bench allreduce.")
    if os.environ.get("GLIBC_TUNABLES"):
        warn("GLIBC_TUNABLES is set: MPI and Gloo are not measured as people run them. Unset it.")
    node = Node.build(comm)
    with _gloo(comm) as gloo:
        _measure(comm, node, gloo, emit, "")
        if comm.allreduce(keep_what_is_freed(), op=MPI.MIN):
            _measure(comm, node, gloo, emit, f" {KEPT}")
        else:
            warn("This C library cannot be told to keep freed memory: no figures of a process that does.")
    node.free()


def _measure(comm: MPI.Comm, node: Node, gloo: Callable[[int], Call], emit: Emit, suffix: str) -> None:
    for mib in SIZES_MIB:
        count = mib * 2**20 // np.dtype(np.float32).itemsize
        ours = _collectives(comm, node)
        contenders = {name: _allreduce(collective, count) for name, collective in ours.items()}
        contenders |= {"gloo": gloo(count), "copy": _copy(count)}
        seconds = interleaved(comm, contenders, rounds=ROUNDS, warmup=2, repeats=max(1, 16 // mib))
        for who, value in seconds.items():
            emit(f"{mib}MiB{suffix}", who, busbw(mib * 2**20, value, comm.size), "GB/s")
        for collective in ours.values():
            collective.free()


def _collectives(comm: MPI.Comm, node: Node) -> dict[str, Collective]:
    """All of the menu that work on so many ranks; the others are left out."""
    built = {}
    for name in collectives.names():
        with suppress(UserError):
            built[name] = collectives.get(name)(comm, node)
    return built


def _allreduce(collective: Collective, count: int) -> Call:
    buffer = collective.allocate(count, np.float32)
    return lambda: collective.allreduce(buffer)


def _copy(count: int) -> Call:
    source, target = arrays.zeros(count, np.float32), arrays.zeros(count, np.float32)
    source.fill(1)  # memory that was never written is one page of zeros, read from the cache
    return lambda: np.copyto(target, source)


@contextmanager
def _gloo(comm: MPI.Comm) -> Iterator[Callable[[int], Call]]:
    """torch.distributed over Gloo among the ranks of `comm`: for a number of elements, an allreduce of that many."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=_store(comm), rank=comm.rank, world_size=comm.size)

    def contender(count: int) -> Call:
        tensor = torch.zeros(count)
        return lambda: dist.all_reduce(tensor)

    yield contender
    dist.destroy_process_group()


def _store(comm: MPI.Comm) -> Any:
    """Where Gloo's ranks find each other: served by rank 0, which tells the others its address by MPI."""
    from torch.distributed import TCPStore

    patience = datetime.timedelta(seconds=TIMEOUT_S)
    host = socket.gethostname()
    if len(set(comm.allgather(host))) == 1:
        host = LOOPBACK
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    server = TCPStore(host, 0, comm.size, True, patience, wait_for_workers=False) if comm.rank == 0 else None
    host, port = comm.bcast((host, server.port) if server else None)
    return server or TCPStore(host, port, comm.size, False, patience)
