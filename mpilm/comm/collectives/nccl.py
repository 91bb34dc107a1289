"""NVIDIA's collectives (AMD's RCCL by the same name), between GPUs: the right choice where links are theirs.

Sums are queued on the current stream and nobody waits for them here. MPI only brings the ranks together: rank 0's
number for the group goes to all. The order of a sum is the library's. Each rank must have a GPU to itself.

A kernel of NCCL's waits on the GPU for those of other ranks. MPI that is given GPU memory may wait for the GPU in its
turn, and both for ever. So the two are never under way together: sums are made by one thread, one after the other, and
`connect` does not take NCCL beside stages whose messages are a GPU's memory, nor beside rings and teams.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI

from mpilm.comm import arrays, order
from mpilm.comm.collectives._base import Collective
from mpilm.comm.devices import HOST, Array
from mpilm.comm.node import Node
from mpilm.comm.transport import ON_HOST, Transport
from mpilm.log import UserError

OTHERS = "Choose --sync.collective shared or ring (or auto)."


class Nccl(Collective):
    """Sums by NCCL."""

    @classmethod
    def lacks(cls, transport: Transport) -> str | None:
        """As Collective."""
        return f"--sync.collective nccl is for GPUs. {OTHERS}" if transport.device is HOST else None

    def __init__(self, comm: MPI.Comm, node: Node, *, reproducible: bool = False,
                 transport: Transport = ON_HOST) -> None:
        """As Collective.

        Raises:
            UserError: On all ranks: one has no NCCL, or two have one GPU; or as Collective.
        """
        super().__init__(comm, node, reproducible=reproducible, transport=transport)
        self._nccl = _library()
        seen = self.comm.allgather((self._nccl is not None, self.device.uuid))
        problem = _problem(seen)
        if problem:
            self.comm.Free()
            raise UserError(f"--sync.collective nccl: {problem} {OTHERS}")
        number = self.comm.bcast(self._nccl.get_unique_id() if self.comm.rank == 0 else None)
        self._group = self._nccl.NcclCommunicator(self.comm.size, number, self.comm.rank)
        self._types = {np.dtype("float32"): self._nccl.NCCL_FLOAT32, np.dtype("float64"): self._nccl.NCCL_FLOAT64,
                       np.dtype("int64"): self._nccl.NCCL_INT64}

    def allreduce(self, buffer: Array) -> None:
        """As Collective."""
        self.check(buffer)
        if len(buffer):
            at = arrays.address(buffer)
            self._group.allReduce(at, at, len(buffer), self._types[buffer.dtype], self._nccl.NCCL_SUM, self._stream())

    def reduce_scatter(self, buffer: Array) -> None:
        """As Collective. Segments differ in length, so each is a reduction of its own; they go together."""
        self.check(buffer)
        self._nccl.groupStart()
        for rank, part in self._parts(buffer):
            at = arrays.address(part)
            self._group.reduce(at, at, len(part), self._types[buffer.dtype], self._nccl.NCCL_SUM, rank, self._stream())
        self._nccl.groupEnd()

    def allgather(self, buffer: Array) -> None:
        """As Collective; likewise."""
        self.check(buffer, allowed=arrays.MOVED)
        self._nccl.groupStart()
        for rank, part in self._parts(buffer):
            self._group.bcast(arrays.address(part), part.nbytes, self._nccl.NCCL_UINT8, rank, self._stream())
        self._nccl.groupEnd()

    def free(self) -> None:
        """As Collective; what is queued is done first."""
        self.device.settle()
        self._group.destroy()
        super().free()

    def _parts(self, buffer: Array) -> list[tuple[int, Array]]:
        """(rank, its segment), of those that have one."""
        cut = order.segments(len(buffer), self.comm.size)
        return [(rank, buffer[part]) for rank, part in enumerate(cut) if part.start < part.stop]

    def _stream(self) -> int:
        return self.device.pointer()


def _library() -> Any:
    """CuPy's NCCL, or None where there is none."""
    try:
        from cupy.cuda import nccl
    except ImportError:
        return None
    return nccl if nccl.available else None


def _problem(seen: list[tuple[bool, str]]) -> str:
    """Why these ranks can't, of which each says whether it has the library, and which GPU."""
    without = [rank for rank, (there, _) in enumerate(seen) if not there]
    if without:
        return f"there is no NCCL on rank {without[0]} (pip install nvidia-nccl-cu13, or what your CUDA needs)."
    uuids = [uuid for _, uuid in seen]
    return "" if len(set(uuids)) == len(uuids) else "each rank needs a GPU of its own, and some share one."
