"""What every collective offers, and the check that stands before every sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from mpilm.comm import arrays, order, p2p
from mpilm.comm.collectives._across import Across
from mpilm.comm.devices import Array
from mpilm.comm.node import Node
from mpilm.comm.transport import ON_HOST, Transport
from mpilm.log import UserError

PIECE_BYTES = 4 * 2**20  # of every segment, summed at a time where everyone sends to everyone
Then = Callable[[slice], None]      # what to do with a part of a buffer


def nothing_more(part: slice) -> None:
    """Nothing is to be done with it."""


class Collective(ABC):
    """A way to sum arrays over the ranks of `comm`. Every method is collective over `comm`.

    Attributes:
        comm: A duplicate of the communicator given, so that nothing else can match its traffic.
        owners: The ranks among whom a reduced buffer is divided; a rank by itself, unless a subclass says otherwise.
        transport, device: How arrays get to MPI, and where those that it sums live.
        fixed_order: Sums are made in the order of `order.tree`, so the ranks do not enter the arithmetic.
    """

    fixed_order: ClassVar[bool] = False

    @classmethod
    def why_not(cls, ranks: int) -> str | None:
        """The reason why it cannot sum over so many ranks; None where it can."""
        return None

    @classmethod
    def lacks(cls, transport: Transport) -> str | None:
        """The reason why it cannot sum what this transport's device has, and what to do; None where it can."""
        return None

    def __init__(self, comm: MPI.Comm, node: Node, *, reproducible: bool = False,
                 transport: Transport = ON_HOST) -> None:
        """Collective over `comm`; `node` was built over the same ranks.

        Raises:
            UserError: Reproducible mode needs a fixed order and this collective has none; or see `why_not` and `lacks`.
        """
        if reason := self.why_not(comm.size):
            raise UserError(f"{reason} Choose --sync.collective auto.")
        if reason := self.lacks(transport):
            raise UserError(reason)
        self.name = type(self).__module__.rpartition(".")[2]
        if reproducible and not self.fixed_order:
            raise UserError(
                f"--sync.collective {self.name} does not sum in a fixed order, which reproducible mode needs. "
                "Choose --sync.collective shared or tree (or auto), or type --run.reproducible false."
            )
        self.comm = comm.Dup()
        self.node, self.transport, self.device = node, transport, transport.device
        self.owners: MPI.Comm = MPI.COMM_SELF
        self._everyone_to_everyone = Across.over(self.comm, transport)
        self._mine = np.zeros(3, np.int64)
        self._everyone = np.zeros((comm.size, 3), np.int64)

    def allocate(self, count: int, dtype: npt.DTypeLike) -> Array:
        """A zeroed 1-D buffer where this collective wants gradients to live."""
        return self.device.zeros(count, dtype)

    def allocate_common(self, count: int, dtype: npt.DTypeLike) -> Array:
        """A zeroed 1-D buffer for allgather: the same memory on all ranks of `owners`."""
        return self.device.zeros(count, dtype)

    @abstractmethod
    def allreduce(self, buffer: Array) -> None:
        """Replace `buffer` by its sum over all ranks, in place; the same bits everywhere.

        On a device that works for itself the sum is there for what the current stream does afterwards.

        Args:
            buffer: Contiguous, 1-D, float32, float64 or int64, of the same length on every rank, an array of `device`.

        Raises:
            TypeError: A buffer that cannot be summed correctly: its dtype, its layout.
            ValueError: Buffers that differ between the ranks.
        """

    def reduce(self, buffer: Array, then: Then = nothing_more) -> None:
        """As allreduce, but only order.segments(count, owners.size)[owners.rank] of `buffer` is then of use.

        Args:
            then: Called with the parts of that segment, one after the other, as their sums are made: they may still be
                in the cache. Parts are cut at multiples of order.BLOCK from the segment's beginning.
        """
        self.allreduce(buffer)
        then(order.segments(len(buffer), self.owners.size)[self.owners.rank])

    def reduce_scatter(self, buffer: Array) -> None:
        """As allreduce, but only order.segments(count, comm.size)[comm.rank] of `buffer` is then of use."""
        self.check(buffer)
        cut = order.segments(len(buffer), self.comm.size)
        for piece in order.pieces(cut, self.device.grain * PIECE_BYTES // buffer.itemsize):
            self._everyone_to_everyone.scatter([buffer], piece, buffer)

    def allgather(self, buffer: Array) -> None:
        """Put everyone's order.segments(count, comm.size)[rank] of `buffer` in its place on all ranks.

        Args:
            buffer: As for allreduce, or uint16. From allocate_common: all its owners may have written their segments
                without a barrier, and nobody touches it until this returns.

        Raises:
            TypeError, ValueError: As allreduce.
        """
        self.check(buffer, allowed=arrays.MOVED)
        cut = order.segments(len(buffer), self.comm.size)
        self._everyone_to_everyone.spread(buffer, order.pieces(cut, arrays.MESSAGE_BYTES // buffer.itemsize))

    def seen(self, buffer: Array, owner: int) -> Array | None:
        """Where I see the same buffer of another rank of `owners`; None where it is that rank's alone. Local."""
        return None

    def free(self) -> None:
        """Give the communicator back. Collective over `comm`."""
        self.comm.Free()

    def check(self, buffer: Array, where: int = 0, *, allowed: Sequence[np.dtype] = arrays.DTYPES) -> bool:
        """Compare type and length of everyone's buffer. Nobody returns before everyone has come.

        Returns:
            Whether `where` is the same on all ranks too.

        Raises:
            TypeError, ValueError: As allreduce, and on all ranks.
        """
        mine, everyone = self._mine, self._everyone
        mine[:] = arrays.code(buffer, allowed, self.device.array), _length(buffer), where
        p2p.wait([self.comm.Iallgather(mine, everyone)])
        if mine[0] >= 0 and everyone.tobytes() == mine.tobytes() * self.comm.size:  # the quickest way to compare
            return True
        if mine[0] < 0 or (everyone[:, :2] != mine[:2]).any():
            self._refuse(buffer, allowed)
        return False

    def _refuse(self, buffer: Array, allowed: Sequence[np.dtype]) -> None:
        """Say which ranks differ, in words."""
        everyone = self._everyone
        if arrays.code(buffer, allowed, self.device.array) < 0:
            given = f"{getattr(buffer, 'ndim', '?')}-D {getattr(buffer, 'dtype', type(buffer).__name__)}"
            where = "" if isinstance(buffer, self.device.array) else f", of {type(buffer).__module__.split('.')[0]}"
            raise TypeError(f"A collective takes a contiguous, writable 1-D array of {', '.join(map(str, allowed))} on "
                            f"{self.device.title}; this is {given}{where}.")
        kinds = [str(allowed[kind]) if kind >= 0 else "unusable" for kind in everyone[:, 0]]
        seen = [f"rank {rank}: {row[1]} x {kind}" for rank, (row, kind) in enumerate(zip(everyone, kinds, strict=True))]
        raise ValueError(f"The ranks gave buffers that differ to one collective: {'; '.join(seen)}.")


def _length(buffer: Array) -> int:
    return int(buffer.size) if hasattr(buffer, "size") else int(np.size(buffer))
