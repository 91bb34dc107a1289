"""Sums of squares of gradients, block by block, for the global norm.

    InParts     by BLAS, part by part as sums are made, while they are in the cache
    InOnePass   compiled, once everything is there; gradients that nobody sums are added up on the way

Which of them it is depends on whether the update is compiled, and on nothing else. So all layouts have the same bits:
what is summed in float32 is the same elements in the same order, whoever does it and of whatever addends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from mpilm import bridge
from mpilm.comm.devices import ROW, Array, Device
from mpilm.flat import add, compile_code

LANES = 16  # as many as the widest vector register has


class Squares(Protocol):
    """How they are made.

    Attributes:
        late: Only of a whole segment, when all is there.
    """

    late: bool

    def __call__(self, gradients: Any, part: slice, out: Array) -> None:
        """out[b] = the sum of squares of block b of a part of a segment, of which `gradients` has the sum, `values`, or
        `addends`; float64."""


class InParts:
    """Of sums, by a device."""

    late = False

    def __init__(self, device: Device) -> None:
        self.device = device

    def __call__(self, gradients: Any, part: slice, out: Array) -> None:
        """As Squares."""
        self.device.squares(gradients.values[part], out)


class InOnePass:
    """Of addends in memory of a CPU."""

    late = True

    def __call__(self, gradients: Any, part: slice, out: Array) -> None:
        """As Squares."""
        addends = gradients.addends
        lanes = compile_code(squares, len(addends))([bridge.rebased(addend[part]) for addend in addends])
        np.sum(lanes.numpy().reshape(len(out), -1), axis=1, dtype=np.float64, out=out)


def by(device: Device, *, compiled: bool) -> Squares:
    """The way for gradients on `device`, which is a CPU if the update is compiled."""
    return InOnePass() if compiled else InParts(device)


def squares(addends: Sequence[Tensor]) -> Tensor:
    """Sums of squares of the sum of `addends`, float32: LANES for every ROW elements, each of every LANES-th of them.

    So each is made one element after the other, by a vector unit of any width, whatever type it reads.
    """
    rows = add(addends).view(-1, ROW // LANES, LANES)
    return (rows * rows).sum(1).flatten()
