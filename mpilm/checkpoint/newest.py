"""Find the checkpoint to go on from: the newest whose every byte is as it was written.

The ranks share the files out by size, verify them at the same time, and agree. Rank 0 alone reads the manifest. Nothing
in the directory is changed, so that other programs may look while a run writes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mpilm.checkpoint import retention
from mpilm.checkpoint.manifest import DamagedError
from mpilm.checkpoint.reader import Reader
from mpilm.log import UserError, warn


class Group(Protocol):
    """What is needed of a communicator."""

    rank: int
    size: int

    def bcast(self, value: Any) -> Any: ...
    def allgather(self, value: Any) -> list[Any]: ...


class Alone:
    """The communicator of a program without MPI."""

    rank = 0
    size = 1

    def bcast(self, value: Any) -> Any:
        """The value."""
        return value

    def allgather(self, value: Any) -> list[Any]:
        """A list of the value."""
        return [value]


def newest(directory: str | Path, comm: Group, *, tell: Callable[[str], None] = warn) -> Reader | None:
    """The newest complete and undamaged checkpoint; None if there is none at all. Collective over `comm`.

    A damaged one is named through `tell`, and the one before it is tried; so it is where one is removed meanwhile.

    Raises:
        UserError: There are some, but none is good; or the newest is of a version that this program can't read, or some
            rank can't read it now.
    """
    directory = Path(directory)
    reasons: list[str] = []
    tried: set[Path] = set()
    while (path := _next(directory, tried, comm)) is not None:
        tried.add(path)
        try:
            return verified(path, comm)
        except UserError as error:
            if not comm.bcast(path.is_dir() if comm.rank == 0 else None):
                continue    # a run that goes on has removed it meanwhile
            if not isinstance(error, DamagedError):
                raise
            reasons.append(str(error))
            tell(f"{error} This checkpoint is not used; the one before it is tried.")
    if reasons:
        raise UserError("\n  ".join([f"{directory}: none of the {len(reasons)} checkpoints is good.", *reasons,
                                     "Remove the directory to start anew, or restore it from a copy."]))
    return None


def _next(directory: Path, tried: set[Path], comm: Group) -> Path | None:
    """The newest that has not been tried; None: there is no other. Collective over `comm`."""
    found, error = comm.bcast(_candidates(directory, tried) if comm.rank == 0 else None)
    if error:
        raise error
    path: Path | None = found
    return path


def _candidates(directory: Path, tried: set[Path]) -> tuple[Path | None, UserError | None]:
    try:
        return next((path for path in retention.complete(directory).values() if path not in tried), None), None
    except OSError as error:
        return None, UserError(f"{directory}: {error.strerror}. A run's checkpoints are in a directory of this name.")


def verified(path: str | Path, comm: Group) -> Reader:
    """This very checkpoint, every file compared with its checksum. Collective over `comm`.

    Raises:
        DamagedError: On every rank the same, naming the first file that is wrong.
        UserError: It is of a version that this program can't read, or some rank can't read a file now.
    """
    reader, error = _opened(path) if comm.rank == 0 else (None, None)
    parsed, error = comm.bcast((reader and reader.manifest, error))
    if error:
        raise error
    reader = Reader(path, parsed)
    problem = None
    try:
        reader.verify(share({name: file.bytes for name, file in parsed.files.items()}, comm.rank, comm.size))
    except UserError as found:
        problem = found
    problems = [found for found in comm.allgather(problem) if found is not None]
    for first in sorted(problems, key=lambda found: isinstance(found, DamagedError)):
        raise first
    return reader


def _opened(path: str | Path) -> tuple[Reader | None, UserError | None]:
    try:
        return Reader(path), None
    except UserError as error:
        return None, error


def share(sizes: dict[str, int], rank: int, size: int) -> list[str]:
    """The files that a rank verifies: the largest file first, each to whoever has least so far."""
    loads = [0] * size
    mine = []
    for name, nbytes in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        owner = loads.index(min(loads))
        loads[owner] += nbytes
        if owner == rank:
            mine.append(name)
    return mine
