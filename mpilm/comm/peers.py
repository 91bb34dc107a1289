"""Memory of a device that the other ranks of the node have opened: everyone sees everyone's array.

    parts = Peers(local, device)
    arrays = parts.allocate(count, np.float32)      # arrays[i] is rank i's; mine is [local.rank]
    parts.free()
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from mpi4py import MPI

from mpilm.comm.devices import Array, Device
from mpilm.comm.memory import SharedMemoryError


class Peers:
    """Of the ranks of `comm`, all on one node. Every method is collective over it."""

    def __init__(self, comm: MPI.Comm, device: Device) -> None:
        self.comm, self.device = comm, device
        self._opened: list[Array] = []
        self._mine: list[Array] = []

    def allocate(self, count: int, dtype: npt.DTypeLike) -> list[Array]:
        """A zeroed array of `count` elements of each rank.

        Raises:
            SharedMemoryError: On any rank, which has none then; nobody waits for it.
        """
        mine = self.device.zeros(count, dtype)
        if not count or self.comm.size == 1:
            return [mine if rank == self.comm.rank else self.device.zeros(0, dtype) for rank in range(self.comm.size)]
        handle, problem = self._export(mine)
        handles: list[tuple[Any, str]] = self.comm.allgather((handle, problem))
        problems = [text for _, text in handles if text]
        if problems:
            raise SharedMemoryError(problems[0])
        self._mine.append(mine)
        parts = []
        for rank, (given, _) in enumerate(handles):
            if rank == self.comm.rank:
                parts.append(mine)
                continue
            parts.append(self.device.open(given, count, dtype))
            self._opened.append(parts[-1])
        return parts

    def _export(self, array: Array) -> tuple[Any, str]:
        try:
            return self.device.export(array), ""
        except SharedMemoryError as error:
            return None, str(error)

    def free(self) -> None:
        """Give all of it back: nobody's memory goes before everyone has closed it."""
        self.device.settle()
        for array in self._opened:
            self.device.close(array)
        self._opened.clear()
        self.comm.Barrier()
        self._mine.clear()
