"""The safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes without gaps.

Written by hand because a snapshot already lies in memory in file order, and goes to disk from there with its checksum;
read by hand because nothing a header says may be believed before it is compared with the size of the file.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.checkpoint import checksum
from mpilm.checkpoint.pieces import CODES, DTYPES, MAX_DIMENSIONS, Piece
from mpilm.progress import Work

HEADER_BYTES = 100_000_000      # the limit of the safetensors library
CHUNK = 1 << 20                 # stays in the cache between the checksum and the write
ALIGNMENT = 64
OPEN = 64
HANDED_ON = 8 << 20            # so many bytes at a time go on to the disk
PAGE = 1 << 16                  # the largest there are
SYNC_FILE_RANGE_WRITE = 2       # linux/fs.h
SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)   # Linux has it


@dataclass(frozen=True)
class Stored:
    """Where an array lies in its file: first byte, dtype, shape."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def header(pieces: Iterable[Piece], step: int) -> bytes:
    """What stands before the bytes of these pieces."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "step": str(step)}}
    begin = 0
    for piece in pieces:
        end = begin + piece.array.nbytes
        entries[piece.key] = {"dtype": CODES[piece.array.dtype], "shape": list(piece.stored_shape),
                              "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write a new file through to the disk; its checksum, as `checksum.WRITTEN`.

    Raises:
        OSError: Whatever the file system says, a full disk for instance.
    """
    checked = checksum.KINDS[checksum.WRITTEN]()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    end = handed_on = 0
    try:
        for chunk in _chunks(parts):
            checked.update(chunk)
            while chunk:
                written = os.write(file, chunk)
                Work.done += written
                end += written
                chunk = chunk[written:]
            if end - handed_on >= HANDED_ON + PAGE:
                whole = end - end % PAGE    # a page that is on its way may have to arrive before it is written to again
                _hand_on(file, handed_on, whole)
                handed_on = whole
        os.fsync(file)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(file)
    return checked.hexdigest()


def _chunks(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        for begin in range(0, len(view), CHUNK):
            yield view[begin:begin + CHUNK]


def _hand_on(file: int, begin: int, end: int) -> None:
    """Have these bytes go to the disk while the next ones are copied: without it the kernel keeps them all until fsync.
    It is advice: whatever goes wrong with them fsync tells."""
    if SYNC_FILE_RANGE is not None:
        SYNC_FILE_RANGE(file, ctypes.c_int64(begin), ctypes.c_int64(end - begin), SYNC_FILE_RANGE_WRITE)


def open_regular(path: Path) -> int:
    """A descriptor to read from; no device, pipe or link that leads elsewhere.

    Raises:
        OSError: It is not there or may not be read.
        ValueError: It is not an ordinary file.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError("is not an ordinary file")
    return file


class OpenFiles:
    """Files that stay open to be read again, the last OPEN of them: a file system with a server (Lustre, NFS) is asked
    once for a file, not once for every run in it."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}    # the one used last is at the end
        weakref.finalize(self, _close, self._open)

    def get(self, path: Path) -> int:
        """A descriptor, which stays ours. Raises as `open_regular` does."""
        file = self._open.pop(path, None)
        if file is None:
            file = open_regular(path)
            if len(self._open) >= OPEN:
                os.close(self._open.pop(next(iter(self._open))))
        self._open[path] = file
        return file


def _close(files: dict[Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def checksum_of(path: Path, size: int, kind: str) -> str:
    """The checksum of a file, in bounded memory.

    Args:
        kind: One of `checksum.KINDS`.

    Raises:
        OSError: It can't be read.
        ValueError: It is not an ordinary file of `size` bytes.
    """
    file = open_regular(path)
    try:
        _require_size(file, size)
        found, buffer = checksum.KINDS[kind](), memoryview(bytearray(CHUNK))
        while count := os.readv(file, [buffer]):
            found.update(buffer[:count])
            Work.done += count
        return found.hexdigest()
    finally:
        os.close(file)


def _require_size(file: int, size: int) -> None:
    found = os.fstat(file).st_size
    if found != size:
        raise ValueError(f"has {found} bytes instead of {size}")


def read_into(file: int, target: np.ndarray, offset: int) -> None:
    """Fill `target` (1-D, contiguous) with the file's bytes from `offset` on.

    Raises:
        OSError: It can't be read.
        ValueError: The file ends before.
    """
    view = target.view(np.uint8).data
    while view:
        count = os.preadv(file, [view], offset)
        if count == 0:
            raise ValueError(f"ends at byte {offset}")
        view, offset = view[count:], offset + count
        Work.done += count


def contents(file: int, size: int) -> dict[str, Stored]:
    """The arrays of an open file by key; every offset lies inside the file.

    Raises:
        OSError: It can't be read.
        ValueError: It is not a safetensors file of `size` bytes.
    """
    _require_size(file, size)
    lead = np.empty(min(8, size), np.uint8)
    read_into(file, lead, 0)
    length = int.from_bytes(lead.tobytes(), "little")
    if size < 8 or length > min(HEADER_BYTES, size - 8):
        raise ValueError("does not start with the length of a safetensors header")
    text = np.empty(length, np.uint8)
    read_into(file, text, 8)
    try:
        entries = json.loads(text.tobytes())
        entries.pop("__metadata__", None)
        return {key: _stored(entry, 8 + length, size) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"has no valid safetensors header ({type(error).__name__}: {error})") from None


def _stored(entry: dict[str, Any], data: int, size: int) -> Stored:
    begin, end = entry["data_offsets"]
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 62 for n in (begin, end, *shape)):
        raise ValueError("a size is not a whole number")
    if end - begin != prod(shape) * dtype.itemsize or data + end > size:
        raise ValueError("an array does not fit into the file")
    return Stored(data + begin, dtype, shape)
