"""How fast a GPU copies, and how near collectives come to that: `bench gpu --part links`.

Ceilings are measured beside what is compared with them, in the same rounds: a copy inside the GPU, copies to pinned
memory of the host and back, and a copy of the host's memory. A collective's figure is bus bandwidth as nccl-tests
defines it. Where ranks share a GPU, all of them copy at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
from mpi4py import MPI

from mpilm.bench.measure import busbw, interleaved
from mpilm.comm import collectives
from mpilm.comm.collectives import Collective
from mpilm.comm.devices import HOST, Device
from mpilm.comm.node import Node
from mpilm.comm.transport import Transport
from mpilm.log import UserError

Emit = Callable[[str, str, float, str], None]
MIB = 2**20
SIZES_MIB = (16, 64, 256)
ROUNDS = 7


def run(comm: MPI.Comm, emit: Emit, transports: Sequence[Transport], *, sizes_mib: Sequence[int] = SIZES_MIB,
        rounds: int = ROUNDS) -> None:
    """Measure. Collective over `comm`.

    Args:
        transports: Of one device; each is measured with every collective that works.
    """
    node, device = Node.build(comm), transports[0].device
    for mib in sizes_mib:
        count = mib * MIB // 4
        built = _collectives(comm, node, transports)
        calls = {f"{name} ({way})": _sum(collective, count) for (name, way), collective in built.items()}
        seconds = interleaved(comm, calls | _copies(device, count), rounds=rounds, warmup=2)
        for who, value in seconds.items():
            if who in calls:
                emit(f"{mib} MiB", who, busbw(mib * MIB, value, comm.size), "GB/s")
            else:
                emit(f"{mib} MiB", who, COPIES[who] * mib * MIB / value / 1e9, "GB/s")
        for collective in built.values():
            collective.free()
    node.free()


def _collectives(comm: MPI.Comm, node: Node, transports: Sequence[Transport]) -> dict[tuple[str, str], Collective]:
    """Those that work here; what does not need a transport inside the node is measured once."""
    built: dict[tuple[str, str], Collective] = {}
    for transport in transports:
        way = "device" if transport.direct else "staged"
        for name in collectives.names():
            alone = name in ("shared", "nccl") and node.num_nodes == 1
            if alone and transport is not transports[0]:
                continue
            with suppress(UserError):
                built[name, "" if alone else way] = collectives.get(name)(comm, node, transport=transport)
    return built


def _sum(collective: Collective, count: int) -> Callable[[], object]:
    buffer = collective.allocate(count, np.float32)

    def call() -> None:
        collective.allreduce(buffer)
        collective.device.settle()
    return call


COPIES = {"copy": 2, "to host": 1, "from host": 1, "copy of the host": 2}     # bytes moved for each byte


def _copies(device: Device, count: int) -> dict[str, Callable[[], object]]:
    """What bounds the collectives."""
    one, two = device.zeros(count, np.float32), device.zeros(count, np.float32)
    pinned, other = device.pinned(count, np.float32), HOST.zeros(count, np.float32)
    pinned.fill(1)

    def settled(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            call()
            device.settle()
        return run

    return {"copy": settled(lambda: two.__setitem__(slice(None), one)),
            "to host": settled(lambda: device.to_host(one, pinned)),
            "from host": settled(lambda: device.to_device(pinned, one)),
            "copy of the host": lambda: np.copyto(other, pinned)}
