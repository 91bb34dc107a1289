"""Arrays as comm/ takes them: one-dimensional, contiguous, of a type that every collective sums correctly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

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


def address(array: Any) -> int:
    """Where its first element lies, in the memory of this process or of its device."""
    if isinstance(array, np.ndarray):
        return int(array.__array_interface__["data"][0])
    return int(array.__cuda_array_interface__["data"][0])


def fetch(source: Any, target: np.ndarray | None = None) -> np.ndarray:
    """The values of any device's array, in `target` or else in memory of the host; they are there on return."""
    if not isinstance(source, np.ndarray):
        found: np.ndarray = source.get() if target is None else source.get(out=target)
        return found
    if target is None:
        return source
    np.copyto(target, source)
    return target


def put(values: np.ndarray, target: Any) -> None:
    """Copy values of the host into any device's contiguous array of the same dtype."""
    if isinstance(target, np.ndarray):
        target[:] = values
    else:
        target.set(np.ascontiguousarray(values, target.dtype))


def chunks(low: int, high: int, length: int) -> Iterator[slice]:
    """Cut low .. high-1 into slices of `length` elements, the last one shorter."""
    for start in range(low, high, length):
        yield slice(start, min(start + length, high))


def messages(array: np.ndarray) -> list[np.ndarray]:
    """A 1-D array in pieces that may be sent; views."""
    return [array[part] for part in chunks(0, array.size, MESSAGE_BYTES // array.itemsize)]


def code(array: Any, allowed: Sequence[np.dtype] = DTYPES, kind: Any = np.ndarray) -> int:
    """The number of an array's type among those `allowed`, or -1 for what a collective cannot work on in place: another
    device's, for instance, whose arrays are not of `kind`."""
    fits = (isinstance(array, kind) and array.ndim == 1 and array.flags.c_contiguous
            and getattr(array.flags, "writeable", True))
    return allowed.index(array.dtype) if fits and array.dtype in allowed else -1
