"""What the writer's thread does: this rank's files, and on rank 0 the manifest and the final name. No MPI."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpilm import disk
from mpilm.checkpoint import manifest, retention, tensorfile
from mpilm.checkpoint.pieces import Piece
from mpilm.comm.arrays import fetch
from mpilm.log import UserError


@dataclass(frozen=True)
class Place:
    """Where a checkpoint goes, and what to name if it can't.

    Args:
        directory: Of all checkpoints.
        step: Of this one.
        rank: Who writes.
        needed: Bytes of all ranks.
    """

    directory: Path
    step: int
    rank: int
    needed: int

    @property
    def partial(self) -> Path:
        """The directory while it is being written."""
        return self.directory / retention.partial(self.step)

    def failed(self, error: OSError) -> UserError:
        """What to tell a person."""
        hint = " Was it removed? Do all nodes share this file system?" if error.errno == errno.ENOENT else ""
        return UserError(
            f"The checkpoint of step {self.step} could not be written: rank {self.rank} on {socket.gethostname()}: "
            f"{error.filename or self.partial}: {error.strerror}.{hint} "
            f"{disk.readable(self.needed)} are needed, {disk.free(self.directory)} are free. {self._earlier()}")

    def _earlier(self) -> str:
        try:
            earlier = any(step <= self.step for step in retention.complete(self.directory))
        except OSError:     # what is there can't be seen now
            return "When the cause is removed, the same command goes on from the newest checkpoint."
        if earlier:
            return (f"Earlier checkpoints in {self.directory} are intact: when the cause is removed, the same command "
                    "goes on from there.")
        return f"No earlier one is in {self.directory}: when the cause is removed, the same command begins again."

    def remove(self) -> None:
        """Leave nothing of it behind, as far as the file system lets us."""
        with suppress(OSError):
            retention.remove(self.partial)


def begin(place: Place) -> None:
    """Make the partial directory, if there is room for all of it. Rank 0 only.

    Raises:
        OSError: Also if there is not (ENOSPC), before anything has been written.
    """
    place.remove()
    disk.require(place.directory, place.needed)
    os.mkdir(place.partial)


class Snapshot:
    """Private memory that pieces are copied into, in file order; allocated once and used again."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def reserve(self, nbytes: int) -> None:
        """Make room. Every page is touched here, so that no copy pays for it later.

        Raises:
            MemoryError: There is none.
        """
        if self._memory.size < nbytes:
            self._memory = np.empty(0, np.uint8)
            self._memory = np.empty(nbytes, np.uint8)
            self._memory.fill(0)

    def copy(self, files: Sequence[Sequence[Piece]]) -> list[memoryview]:
        """Copy the pieces; the bytes of each file."""
        sizes = [_aligned(sum(piece.array.nbytes for piece in file)) for file in files]
        self.reserve(sum(sizes))
        views, first = [], 0
        for file, size in zip(files, sizes, strict=True):
            end = first
            for piece in file:
                target = self._memory[end:end + piece.array.nbytes]
                fetch(piece.array, target.view(piece.array.dtype))
                end += target.size
            views.append(self._memory[first:end].data)
            first += size
        return views


def _aligned(nbytes: int) -> int:
    return -(-nbytes // tensorfile.ALIGNMENT) * tensorfile.ALIGNMENT


def write_share(place: Place, files: Sequence[Sequence[Piece]], views: Sequence[memoryview],
                announced: Sequence[Piece]) -> dict[str, Any]:
    """Write this rank's files to the disk; its part of the manifest.

    Raises:
        UserError: The file system refuses; the message names rank, path and space.
    """
    written = []
    try:
        for number, (pieces, view) in enumerate(zip(files, views, strict=True)):
            name = f"rank-{place.rank:05d}-part-{number:02d}.safetensors"
            lead = tensorfile.header(pieces, place.step)
            found = tensorfile.write(place.partial / name, [lead, view])
            written.append((name, pieces, len(lead) + len(view), found))
    except OSError as error:
        raise place.failed(error) from error
    return manifest.record(written, announced)


def commit(place: Place, records: Sequence[dict[str, Any]], meta: dict[str, Any], kept: retention.Kept, *,
           write_s: float) -> list[str]:
    """Make what all ranks wrote a complete checkpoint, then remove what need not stay. Rank 0 only.

    Returns:
        What to warn about.

    Raises:
        UserError: The file system refuses, or a file is not there any more, or there are too many pieces.
        ValueError: The pieces of all ranks don't cover every tensor exactly once.
    """
    text = manifest.dumps(place.step, records, meta, write_s=write_s)
    if len(text) > manifest.MAX_BYTES:
        raise UserError(f"The checkpoint of step {place.step} has so many pieces that its manifest would be too large "
                        f"to be read: {disk.readable(len(text))}, at most {disk.readable(manifest.MAX_BYTES)}. Raise "
                        "--sync.bucket_mib, or give --sync.save_replicas false. Earlier checkpoints are intact.")
    try:
        for part in records:
            for name, file in part["files"].items():
                _require_there(place.partial / name, file["bytes"])
        tensorfile.write(place.partial / manifest.FILE, [text])
        retention.publish(place.directory, place.step)
    except OSError as error:
        raise place.failed(error) from error
    try:
        return retention.prune(place.directory, place.step, kept)
    except OSError as error:
        return [f"{error.filename or place.directory} could not be removed: {error.strerror}."]


def _require_there(path: Path, size: int) -> None:
    if os.stat(path).st_size != size:
        raise OSError(errno.EIO, "another process changed its size; is a second job using this directory?", str(path))
