"""Who serves and who works: the first ranks hold parameters and update them, the others compute gradients.

    roles = Roles.build(world.comm, servers=1)
    roles.side              the ranks that do what I do
    roles.serving           whether that is serving

    rank    0 | 1 2 3       servers=1: workers 0, 1 and 2 are the ranks 1, 2 and 3

Without servers everyone works.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpi4py import MPI


@dataclass(frozen=True)
class Roles:
    """Attributes:
    comm: All ranks; for gradients on their way to servers and parameters on their way back, and nothing else.
    side: Those of my kind.
    servers: How many there are.
    """

    comm: MPI.Comm
    side: MPI.Comm
    servers: int

    @classmethod
    def build(cls, comm: MPI.Comm, *, servers: int) -> Roles:
        """Collective over `comm`, which has more ranks than `servers`."""
        own = comm.Dup()
        return cls(own, own.Split(own.rank < servers, key=own.rank), servers)

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

    def free(self) -> None:
        """Give the communicators back. Collective over the communicator that this was built over."""
        self.side.Free()
        self.comm.Free()
