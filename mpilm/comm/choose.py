"""Which collective: the one named, or for `auto` the one that is fastest here, by a short measurement.

    collective = build("auto", comm, node, count=bucket, reproducible=True)     # says: "shared: 11.2 GB/s, tree 5.1"
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection

import numpy as np
from mpi4py import MPI

from mpilm.comm import collectives
from mpilm.comm.collectives import Collective
from mpilm.comm.devices import Array
from mpilm.comm.node import Node, SharedMemoryError
from mpilm.comm.transport import ON_HOST, Transport
from mpilm.log import UserError, say, warn

ROUNDS = 5
LONGEST = 4 * 2**20  # elements measured at most: 16 MiB of float32, past every cache
FAST = ("shared", "ring", "mpi", "nccl")
FIXED_ORDER = ("shared", "tree")


def build(
    name: str, comm: MPI.Comm, node: Node, *, count: int, reproducible: bool = False, shared_bytes: int = 0,
    transport: Transport = ON_HOST, never: Collection[str] = (),
) -> Collective:
    """The collective of that name, or the fastest for `auto`; says what it picked. Collective over `comm`.

    Where a node cannot share memory, `shared` gives way to the fastest of the others, and that is said too.

    Args:
        name: A file of collectives/, or "auto".
        comm: The ranks to sum over.
        node: Built over the same ranks.
        count: Elements of a bucket of gradients.
        reproducible: Sums must be in tree order.
        shared_bytes: What the caller will allocate in node-shared memory on every node if `shared` is the one.
        transport: Of the device whose arrays are summed.
        never: What `auto` must not pick.

    Raises:
        UserError: It cannot work here; names what can.
    """
    asks_node = name in ("auto", "shared") and transport.device.shares
    without = _unusable(comm, node, shared_bytes) if asks_node else ()
    if name == "auto" or name in without:
        name, seen = measure(comm, node, count, reproducible=reproducible, without=(*without, *never),
                             transport=transport)
        figures = ", ".join(f"{who} {value:.1f}" for who, value in seen.items())
        if seen:
            say(f"allreduce: {name} (GB/s over {4 * count / 2**20:.3g} MiB: {figures})")
    return collectives.get(name)(comm, node, reproducible=reproducible, transport=transport)


def _unusable(comm: MPI.Comm, node: Node, shared_bytes: int) -> tuple[str, ...]:
    """`shared` where a node has no room for so much; says so."""
    rooms = comm.allgather(node.room())
    if min(rooms) > shared_bytes:
        return ()
    warn(f"The ranks of a node can share {min(rooms) / 2**20:.0f} MiB (by {', '.join(node.ways)}), and "
         f"{shared_bytes / 2**20:.3g} MiB are needed, so --sync.collective shared is left out.")
    return ("shared",)


def measure(
    comm: MPI.Comm, node: Node, count: int, *, reproducible: bool = False, without: Collection[str] = (),
    transport: Transport = ON_HOST,
) -> tuple[str, dict[str, float]]:
    """Time an allreduce of `count` float32 by every candidate. Collective over `comm`; the same answer on all ranks.

    Args:
        comm, node, count, reproducible, transport: As in `build`.
        without: Candidates to leave out.

    Returns:
        The fastest, and the bus bandwidth of each in GB/s; with one rank, where nothing moves, the first that works.

    Raises:
        UserError: None works here.
    """
    count = max(1, min(count, transport.device.grain * LONGEST))
    candidates = _candidates(comm, node, reproducible=reproducible, without=without, transport=transport)
    if comm.size == 1:
        for candidate in candidates.values():
            candidate.free()
        return next(iter(candidates)), {}
    buffers = {name: candidate.allocate(count, np.float32) for name, candidate in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(ROUNDS + 1):
        for name, candidate in candidates.items():
            seconds = _timed(comm, candidate, buffers[name])
            if turn:
                times[name].append(seconds)
    for candidate in candidates.values():
        candidate.free()
    medians = {name: statistics.median(seen) for name, seen in times.items()}
    fastest = min(medians, key=lambda name: medians[name])
    moved = 4 * count * 2 * (comm.size - 1) / comm.size / 1e9
    return fastest, {name: moved / seconds for name, seconds in medians.items()}


def _candidates(
    comm: MPI.Comm, node: Node, *, reproducible: bool, without: Collection[str], transport: Transport
) -> dict[str, Collective]:
    """Everything that `auto` may pick and that works on these ranks."""
    built: dict[str, Collective] = {}
    reasons = []
    for name in FIXED_ORDER if reproducible else FAST:
        kind = collectives.get(name)
        if name in without:
            continue
        if reason := kind.why_not(comm.size):
            reasons.append(reason)
            continue
        try:
            built[name] = kind(comm, node, reproducible=reproducible, transport=transport)
        except (UserError, SharedMemoryError) as error:
            reasons.append(str(error))
    if not built:
        raise UserError(f"No collective sums in a fixed order here: {' '.join(reasons)} Start as many replicas as a "
                        "power of two, or give --run.reproducible false.")
    return built


def _timed(comm: MPI.Comm, candidate: Collective, buffer: Array) -> float:
    """Seconds of one allreduce, of the slowest rank."""
    comm.Barrier()
    start = time.perf_counter()
    candidate.allreduce(buffer)
    candidate.device.settle()
    return float(comm.allreduce(time.perf_counter() - start, op=MPI.MAX))
