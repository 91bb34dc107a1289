"""The CPU and its memory: NumPy arrays. What a call does has happened when it returns."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mpilm import placement
from mpilm.comm import arrays
from mpilm.comm.devices._base import Device


class Host(Device):
    """This process's own memory."""

    array = np.ndarray
    torch = "cpu"
    shares: ClassVar[bool] = True

    def empty(self, count: int, dtype: npt.DTypeLike) -> np.ndarray:
        """As Device."""
        return np.empty(count, dtype)

    def zeros(self, count: int, dtype: npt.DTypeLike) -> np.ndarray:
        """As Device; nobody opens it."""
        return arrays.zeros(count, dtype)

    def pinned(self, count: int, dtype: npt.DTypeLike) -> np.ndarray:
        """As Device."""
        return np.empty(count, dtype)

    def to_host(self, source: np.ndarray, target: np.ndarray) -> None:
        """As Device."""
        target[:] = source

    def to_device(self, source: np.ndarray, target: np.ndarray) -> None:
        """As Device."""
        target[:] = source

    def stream(self, name: str) -> AbstractContextManager[None]:
        """As Device."""
        return nullcontext()

    def record(self) -> None:
        """As Device."""

    def happened(self, event: Any) -> bool:
        """As Device."""
        return True

    def follow(self, event: Any) -> None:
        """As Device."""

    def wait(self, event: Any) -> None:
        """As Device."""

    def stamp(self) -> float:
        """As Device."""
        return time.perf_counter()

    def elapsed(self, first: float, last: float) -> float:
        """As Device."""
        return last - first

    def settle(self) -> None:
        """As Device."""

    def free_bytes(self) -> int:
        """As Device; of the whole node."""
        return placement.available_memory()

    @property
    def uuid(self) -> str:
        """Every rank is a device of its own."""
        return ""

    @property
    def title(self) -> str:
        """As Device."""
        return "CPU"
