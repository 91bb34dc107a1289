"""What collectives, buckets and the trainer ask of a device.

Work on a device's arrays is queued on a stream, and a call may return before it has happened. Each thread has a current
stream; work of one stream happens in the order of its calls. Two streams know nothing of each other, but for events:

    compute stream        gradients ... | record ->|            |-> follow  update
    communication stream                           |-> follow  sums  record ->|

What MPI is given must have happened: `settle` waits for the current stream, and it is the only thing that does so
before a pointer goes to MPI (p2p.Ledger, meet.Meet and collectives/mpi call it, nobody else needs to). On a host all of
this is nothing: what a call does has happened when it returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mpilm.comm.devices._sums import LocalSum, NodeSum
from mpilm.comm.memory import SharedMemoryError
from mpilm.comm.order import BLOCK

Array = Any     # numpy.ndarray, cupy.ndarray, or whatever else a device's arrays are
COMMUNICATION, OUT, IN = STREAMS = ("communication", "out", "in")
ROW = 4096  # values whose squares are summed in float32


class Device(ABC):
    """One device of this process.

    Attributes:
        array: The type of its arrays.
        torch: Torch's name for it: "cpu", "cuda:0".
        shares: Ranks of a node may have one buffer in common, which each of them reads and writes as its own.
        grain: Its pieces of work are so many times as long as those that fit into a CPU's cache.
    """

    array: type
    torch: str
    shares: ClassVar[bool] = False
    grain: ClassVar[int] = 1

    @abstractmethod
    def empty(self, count: int, dtype: npt.DTypeLike) -> Array:
        """A 1-D array of `count` elements, whatever they are, for a short time."""

    @abstractmethod
    def zeros(self, count: int, dtype: npt.DTypeLike) -> Array:
        """A 1-D array of zeros, and they are there; for long, and for other processes to open (`export`)."""

    @abstractmethod
    def pinned(self, count: int, dtype: npt.DTypeLike) -> np.ndarray:
        """Host memory which `to_host` and `to_device` copy to and from while the caller goes on."""

    @abstractmethod
    def to_host(self, source: Array, target: np.ndarray) -> None:
        """Queue a copy of `source` into `pinned` memory of the same length and dtype."""

    @abstractmethod
    def to_device(self, source: np.ndarray, target: Array) -> None:
        """Queue a copy of `pinned` memory into `target`; `source` must stay as it is until that has happened."""

    @abstractmethod
    def stream(self, name: str) -> AbstractContextManager[None]:
        """In such a block the current stream of this thread is one of STREAMS."""

    def pointer(self) -> int:
        """The current stream, as torch would take it; 0 is what torch takes by itself."""
        return 0

    @abstractmethod
    def record(self) -> Any:
        """An event that has happened when everything queued on the current stream so far has."""

    @abstractmethod
    def happened(self, event: Any) -> bool:
        """Whether it has; does not wait."""

    @abstractmethod
    def follow(self, event: Any) -> None:
        """What is queued on the current stream from now on happens after `event`. Does not wait."""

    @abstractmethod
    def wait(self, event: Any) -> None:
        """Return when `event` has happened."""

    @abstractmethod
    def stamp(self) -> Any:
        """As `record`, of an event that knows when it happens."""

    @abstractmethod
    def elapsed(self, first: Any, last: Any) -> float:
        """Seconds between two stamps of one stream; waits until they have happened."""

    @abstractmethod
    def settle(self) -> None:
        """Return when everything queued on the current stream has happened."""

    def export(self, array: Array) -> Any:
        """What another process of this node needs to `open` an array that `zeros` made; it is sent by MPI. A host has
        nothing of the kind: its ranks share memory by node.Node.

        Raises:
            SharedMemoryError: It cannot be opened from outside.
        """
        raise SharedMemoryError(f"{self.title}: other processes can't open its memory.")

    def open(self, handle: Any, count: int, dtype: npt.DTypeLike) -> Array:
        """Another process's array, as an array of mine. It keeps its memory until all have closed it.

        Raises:
            SharedMemoryError: This process may not.
        """
        raise SharedMemoryError(f"{self.title}: other processes can't open its memory.")

    def close(self, array: Array) -> None:
        """Give back what `open` gave."""
        raise SharedMemoryError(f"{self.title}: nothing of another process has been opened.")

    def signal(self) -> Signal | None:
        """An event that other processes of this node can follow; None where there is no such thing."""
        return None

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that is left."""

    @property
    @abstractmethod
    def uuid(self) -> str:
        """What tells this device from all others; of two processes with the same one, it is the same device."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Its name, for a person."""

    @property
    def fp8(self) -> bool:
        """Whether torch multiplies fp8 there."""
        return True

    def local_sum(self, leaves: Sequence[range], *, first: int, size: int, mine: int) -> NodeSum:
        """As LocalSum, which serves wherever NumPy's functions take the arrays."""
        return LocalSum(leaves, first=first, size=size, mine=mine, zeros=self.zeros, grain=self.grain)

    def squares(self, values: Array, out: Array) -> None:
        """out[b] = the sum of squares of block b of `values`, each by itself; `values` are whole blocks, float32.

        A row is one call of BLAS, too short for OpenBLAS to split it among threads: its bits depend on it alone. This
        serves NumPy's arrays; a device with others has a way of its own.
        """
        rows = values.reshape(-1, ROW)
        with np.errstate(over="ignore"):    # whoever finds an infinite norm says so
            sums = np.vecdot(rows, rows)
        np.sum(sums.reshape(-1, BLOCK // ROW), axis=1, dtype=np.float64, out=out)


class Signal(ABC):
    """An event that processes of a node share, recorded again and again.

    Attributes:
        handle: What the other processes need to follow it; it is sent by MPI.
    """

    handle: Any

    @abstractmethod
    def record(self) -> None:
        """It happens when everything queued on the current stream so far has."""

    @abstractmethod
    def follow(self, handle: Any, turn: int) -> None:
        """What is queued on the current stream from now on happens after the event `handle` of another process, as it
        was recorded for the `turn`th time. That process must have made the call before."""
