"""Who serves and who works: the first ranks hold parameters and update them, the others compute gradients.

    roles = Roles.build(world.comm, servers=1)
    roles.side              the ranks that do what I do
    roles.serving           whether that is serving

    rank    0 | 1 2 3       servers=1: workers 0, 1 and 2 are the ranks 1, 2 and 3

Without servers everyone works.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpilm.comm.devices import HOST, Device
from mpilm.comm.node import Node, SharedMemoryError


@dataclass(frozen=True)
class Roles:
    """Attributes:
    comm: All ranks; for gradients on their way to servers and parameters on their way back, and nothing else.
    side: Those of my kind.
    servers: How many there are.
    node: Where the ranks of `comm` sit.
    device: What workers compute on; servers use the host.
    """

    comm: MPI.Comm
    side: MPI.Comm
    servers: int
    node: Node
    device: Device = HOST

    @classmethod
    def build(cls, comm: MPI.Comm, *, servers: int, device: Device = HOST) -> Roles:
        """Collective over `comm`, which has more ranks than `servers`."""
        own = comm.Dup()
        return cls(own, own.Split(own.rank < servers, key=own.rank), servers, Node.build(own), device)

    @property
    def serving(self) -> bool:
        """This rank is a server."""
        return self.comm.rank < self.servers

    @property
    def workers(self) -> int:
        """How many there are."""
        return self.comm.size - self.servers

    def rank(self, worker: int) -> int:
        """The rank in `comm` of a worker."""
        return self.servers + worker

    def places(self, count: int, *, wanted: bool = True) -> list[np.ndarray | None]:
        """For the gradients of each worker: [count] float32, zeroed, that it and the servers of my node all see.

        None for a worker of another node, and where nothing can or need be shared, or is `wanted`. Collective over
        `comm`.
        """
        near = self.node.members[self.node.index]
        workers = [rank - self.servers for rank in near if rank >= self.servers]
        places: list[np.ndarray | None] = [None] * self.workers
        if wanted and 0 < len(workers) < len(near):
            with suppress(SharedMemoryError):   # messages will do
                whole = self.node.allocate_common(len(workers) * count, np.float32)
                for number, worker in enumerate(workers):
                    places[worker] = whole[number * count:(number + 1) * count]
        return places

    def near(self, rank: int) -> bool:
        """Whether a rank of `comm` is in my node."""
        return rank in self.node.members[self.node.index]

    def free(self) -> None:
        """Give the communicators back. Collective over the communicator that this was built over."""
        self.node.free()
        self.side.Free()
        self.comm.Free()
