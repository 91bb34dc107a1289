"""The ranks of one host, and the memory they share.

    node = Node.build(comm)
    parts = node.allocate(count, np.float32)     # parts[i] is rank i's array; everyone sees all of them
    weights = node.allocate_common(count, np.float32)      # one array that everyone sees

A write becomes visible to the others by a barrier over `node.comm`, not before. A node of one rank has ordinary memory
through the same calls.

Two environment variables, the same on all ranks:
- MPILM_RANKS_PER_NODE=2 splits the ranks of a host into "nodes" of two that share nothing with each other, so that one
  machine runs what a cluster would.
- MPILM_SHARED_MEMORY=memfd:/dev/shm says how memory may be shared (memory.py), in the order tried.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpilm.comm import memory
from mpilm.comm.devices import HOST, Array, Device
from mpilm.comm.memory import SharedMemoryError
from mpilm.log import UserError

__all__ = ["Node", "SharedMemoryError"]

WAYS = "memfd:/dev/shm"
PAGE = 4096  # bytes; parts start on pages of their own, so that each can lie on its rank's NUMA node


@dataclass(frozen=True)
class Node:
    """Where this rank sits.

    Attributes:
        comm: The ranks of my node.
        peers: The ranks with my node-local rank, one on every node that has so many.
        num_nodes: Nodes of the communicator that this was built over.
        members: For every node, the ranks (of that communicator) on it, nodes in the order of their first rank.
        index: Which of them is mine.
        ways: How memory may be shared, in the order tried (memory.py).
    """

    comm: MPI.Comm
    peers: MPI.Comm
    num_nodes: int
    members: tuple[tuple[int, ...], ...]
    index: int
    ways: tuple[str, ...]

    @classmethod
    def build(cls, comm: MPI.Comm, *, ranks_per_node: int = 0, ways: Sequence[str] = ()) -> Node:
        """Find out which ranks of `comm` share a host. Collective over `comm`.

        Args:
            comm: The ranks to place.
            ranks_per_node: Emulate nodes of so many ranks of one host; 0: as MPILM_RANKS_PER_NODE says, else the host.
            ways: How memory may be shared, "memfd" or folders; none: as MPILM_SHARED_MEMORY says, else `WAYS`.

        Raises:
            UserError: MPILM_RANKS_PER_NODE is not a positive number.
        """
        host = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
        local = host.Split(host.rank // (ranks_per_node or _emulated() or host.size), key=host.rank)
        host.Free()
        peers = comm.Split(local.rank, key=comm.rank)
        members = tuple(sorted(set(comm.allgather(tuple(local.allgather(comm.rank))))))
        index = next(number for number, ranks in enumerate(members) if comm.rank in ranks)
        return cls(local, peers, len(members), members, index, tuple(ways) or _ways())

    def allocate(self, count: int, dtype: npt.DTypeLike) -> list[np.ndarray]:
        """One zeroed array a rank of the node; mine is [node.comm.rank]. Collective over `node.comm`.

        Returns:
            1-D arrays of `count` elements each, aligned to a page (a cache line in a node of one rank).

        Raises:
            SharedMemoryError: On all ranks of the node.
        """
        itemsize = np.dtype(dtype).itemsize
        stride = -(-count * itemsize // PAGE) * PAGE
        whole = self.allocate_common(stride * self.comm.size, np.uint8)
        starts = range(0, stride * self.comm.size, stride) if stride else [0] * self.comm.size
        return [whole[start : start + count * itemsize].view(dtype) for start in starts]

    def allocate_common(self, count: int, dtype: npt.DTypeLike, device: Device = HOST) -> Array:
        """One zeroed 1-D array of `count` elements that all ranks of the node see. Collective over `node.comm`.

        Args:
            device: Where; one that ranks do not share is for nodes of one rank.

        Raises:
            SharedMemoryError: On all ranks of the node.
        """
        if self.comm.size == 1 or count == 0:
            return device.zeros(count, dtype)
        assert device.shares, f"the ranks of a node have no memory of {device.title} in common"
        block = memory.share(self.comm, count * np.dtype(dtype).itemsize, ways=self.ways)
        return np.frombuffer(block, dtype)

    def room(self) -> int:
        """Bytes that the ranks of my node can share. Collective over `node.comm`."""
        if self.comm.size == 1:
            return sys.maxsize
        smallest: int = self.comm.allreduce(memory.room(self.comm, ways=self.ways), op=MPI.MIN)
        return smallest

    def free(self) -> None:
        """Give the communicators back. Collective over the communicator that the node was built over."""
        self.peers.Free()
        self.comm.Free()


def _ways() -> tuple[str, ...]:
    return tuple(filter(None, os.environ.get("MPILM_SHARED_MEMORY", WAYS).split(":")))


def _emulated() -> int:
    text = os.environ.get("MPILM_RANKS_PER_NODE", "0")
    if not text.isdecimal():
        raise UserError(f"MPILM_RANKS_PER_NODE={text}: give the number of ranks of an emulated node, or unset it.")
    return int(text)
