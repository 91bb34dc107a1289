"""What every collective offers, and the check that stands before every sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpilm.comm import arrays, p2p
from mpilm.comm.node import Node
from mpilm.log import UserError


class Collective(ABC):
    """A way to sum arrays over the ranks of `comm`. Every method is collective over `comm`.

    Attributes:
        comm: A duplicate of the communicator given, so that nothing else can match its traffic.
        owners: The ranks among whom a reduced buffer is divided; a rank by itself, unless a subclass says otherwise.
        fixed_order: Sums are made in the order of `order.tree`, so the ranks do not enter the arithmetic.
    """

    fixed_order: ClassVar[bool] = False

    def __init__(self, comm: MPI.Comm, node: Node, *, reproducible: bool = False) -> None:
        """Collective over `comm`; `node` was built over the same ranks.

        Raises:
            UserError: Reproducible mode needs a fixed order and this collective has none.
        """
        self.name = type(self).__module__.rpartition(".")[2]
        if reproducible and not self.fixed_order:
            raise UserError(
                f"--sync.collective {self.name} does not sum in a fixed order, which reproducible mode needs. "
                "Choose --sync.collective shared or tree (or auto), or type --run.reproducible false."
            )
        self.comm = comm.Dup()
        self.node = node
        self.owners: MPI.Comm = MPI.COMM_SELF
        self._mine = np.zeros(3, np.int64)
        self._everyone = np.zeros((comm.size, 3), np.int64)

    def allocate(self, count: int, dtype: npt.DTypeLike) -> np.ndarray:
        """A zeroed 1-D buffer where this collective wants gradients to live."""
        return arrays.zeros(count, dtype)

    @abstractmethod
    def allreduce(self, buffer: np.ndarray) -> None:
        """Replace `buffer` by its sum over all ranks, in place; the same bits everywhere.

        Args:
            buffer: Contiguous, 1-D, float32, float64 or int64, of the same length on every rank.

        Raises:
            TypeError: A buffer that cannot be summed correctly: its dtype, its layout.
            ValueError: Buffers that differ between the ranks.
        """

    def reduce(self, buffer: np.ndarray) -> None:
        """As allreduce, but only order.segments(count, owners.size)[owners.rank] of `buffer` is then of use."""
        self.allreduce(buffer)

    def free(self) -> None:
        """Give the communicator back. Collective over `comm`."""
        self.comm.Free()

    def check(self, buffer: np.ndarray, where: int = 0) -> bool:
        """Compare type and length of everyone's buffer. Nobody returns before everyone has come.

        Returns:
            Whether `where` is the same on all ranks too.

        Raises:
            TypeError, ValueError: As allreduce, and on all ranks.
        """
        mine, everyone = self._mine, self._everyone
        mine[:] = arrays.code(buffer), np.size(buffer), where
        p2p.wait([self.comm.Iallgather(mine, everyone)])
        if mine[0] >= 0 and everyone.tobytes() == mine.tobytes() * self.comm.size:  # the quickest way to compare
            return True
        if mine[0] < 0 or (everyone[:, :2] != mine[:2]).any():
            _refuse(everyone, buffer)
        return False


def _refuse(everyone: np.ndarray, buffer: np.ndarray) -> None:
    """Say which ranks differ, in words."""
    allowed = ", ".join(str(dtype) for dtype in arrays.DTYPES)
    if arrays.code(buffer) < 0:
        given = f"{getattr(buffer, 'ndim', '?')}-D {getattr(buffer, 'dtype', type(buffer).__name__)}"
        raise TypeError(f"An allreduce takes a contiguous, writable 1-D array of {allowed}; this is {given}.")
    kinds = [str(arrays.DTYPES[kind]) if kind >= 0 else "unusable" for kind in everyone[:, 0]]
    seen = [f"rank {rank}: {row[1]} x {kind}" for rank, (row, kind) in enumerate(zip(everyone, kinds, strict=True))]
    raise ValueError(f"The ranks gave buffers that differ to one allreduce: {'; '.join(seen)}.")
