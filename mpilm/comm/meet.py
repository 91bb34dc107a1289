"""Ranks of a node that work on each other's memory meet: what any of them did before, all of them find done after.

    meet = Meet(local, device)
    ... write what others read ...
    meet()
    ... read what others have written ...

On a host that is a barrier. A device's work is queued, so each rank records an event, all learn by a barrier that it
is recorded, and everyone's stream follows everyone's event: nobody waits for a kernel. Where processes cannot share
events, each waits for its own stream before the barrier.
"""

from __future__ import annotations

from mpi4py import MPI

from mpilm.comm import p2p
from mpilm.comm.devices import Device


class Meet:
    """Of the ranks of `comm`, all on one node. Collective over it, like every call.

    Args:
        comm: Private to this.
        device: Whose arrays they read and write.
    """

    def __init__(self, comm: MPI.Comm, device: Device) -> None:
        self.comm, self.device = comm, device
        mine = device.signal() if comm.size > 1 else None
        handles = comm.allgather(None if mine is None else mine.handle)
        self.signal = mine if all(handle is not None for handle in handles) else None
        self.others = [handle for rank, handle in enumerate(handles) if rank != comm.rank]
        self.turn = 0

    def __call__(self) -> None:
        """Meet. What the current stream of the calling thread has queued counts."""
        if self.signal is None:
            self.device.settle()
            p2p.barrier(self.comm)
            return
        self.turn += 1
        self.signal.record()
        p2p.barrier(self.comm)
        for handle in self.others:
            self.signal.follow(handle, self.turn)
