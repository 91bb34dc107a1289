"""How an array gets from its device to MPI and back.

    transport = Direct(device)          MPI is given the memory itself: a host's always, a GPU's if MPI knows GPUs
    transport = Staged(device)          through pinned memory of the host, piece by piece
    ledger = transport.ledger()         messages, as p2p.Ledger has them, of this device's arrays

`--comm.transport device` and `staged` are the two of MENU; `auto` asks and tries (aware.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from mpilm.comm import p2p
from mpilm.comm._staged import Pool, StagedLedger
from mpilm.comm.devices import HOST, Device


class Transport(ABC):
    """Of one device.

    Attributes:
        direct: MPI can be given this device's arrays.
    """

    direct: ClassVar[bool]

    def __init__(self, device: Device) -> None:
        self.device = device

    @abstractmethod
    def ledger(self, *, synchronous: bool = False) -> p2p.Ledger:
        """For messages of a thread, whose current stream their arrays belong to."""


class Direct(Transport):
    """The device's own memory."""

    direct = True

    def ledger(self, *, synchronous: bool = False) -> p2p.Ledger:
        """As Transport."""
        return p2p.Ledger(synchronous=synchronous, settle=self.device.settle)


class Staged(Transport):
    """Pinned memory of the host, `piece_bytes` at a time."""

    direct = False

    def __init__(self, device: Device, *, piece_bytes: int = 0) -> None:
        super().__init__(device)
        self.pool = Pool(device, piece_bytes)

    def ledger(self, *, synchronous: bool = False) -> p2p.Ledger:
        """As Transport."""
        return StagedLedger(self.pool, synchronous=synchronous)


MENU: dict[str, type[Transport]] = {"device": Direct, "staged": Staged}
ON_HOST = Direct(HOST)
