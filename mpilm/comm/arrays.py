"""Arrays as comm/ takes them: one-dimensional, contiguous, of a type that every collective sums correctly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

DTYPES = tuple(np.dtype(name) for name in ("float32", "float64", "int64"))
MOVED = (*DTYPES, np.dtype(np.uint16))  # what is sent without being summed: bfloat16 comes as the bits of a uint16
ALIGNMENT = 64  # bytes: a cache line and the widest vector register
MESSAGE_BYTES = 256 * 2**20  # no message is longer: MPI counts are 32-bit in many libraries


def zeros(count: int, dtype: npt.DTypeLike) -> np.ndarray:
    """A zeroed 1-D array whose first element is aligned to ALIGNMENT."""
    dtype = np.dtype(dtype)
    raw = np.zeros(count * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count * dtype.itemsize].view(dtype)


def address(array: np.ndarray) -> int:
    """Where its first element lies in this process's memory."""
    return int(array.__array_interface__["data"][0])


def chunks(low: int, high: int, length: int) -> Iterator[slice]:
    """Cut low .. high-1 into slices of `length` elements, the last one shorter."""
    for start in range(low, high, length):
        yield slice(start, min(start + length, high))


def messages(array: np.ndarray) -> list[np.ndarray]:
    """A 1-D array in pieces that may be sent; views."""
    return [array[part] for part in chunks(0, array.size, MESSAGE_BYTES // array.itemsize)]


def code(array: np.ndarray, allowed: Sequence[np.dtype] = DTYPES) -> int:
    """The number of an array's type among those `allowed`, or -1 for what a collective cannot work on in place."""
    fits = isinstance(array, np.ndarray) and array.ndim == 1 and array.flags.c_contiguous and array.flags.writeable
    return allowed.index(array.dtype) if fits and array.dtype in allowed else -1
