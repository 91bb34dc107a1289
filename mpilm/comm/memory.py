"""Memory that the ranks of a node share: one block, mapped by all, nameless from then on.

    block = share(comm, nbytes, ways=("memfd", "/dev/shm"))      # a zeroed mmap of nbytes on every rank

Ways, tried in this order until one works on all ranks:
- "memfd": an anonymous file of the node's rank 0, which the others open as /proc/<pid>/fd/<n>. It never has a name, so
  whatever is killed when, nothing stays behind; and the size of /dev/shm (64 MB in many containers) does not limit it.
- a folder, such as "/dev/shm": a file there, for nodes whose ranks cannot see each other in /proc (a container each).
  It is unlinked as soon as all have mapped it.

Space is reserved before it is used, every rank its own share (which also puts the pages on the rank's own NUMA node),
so that too little is an error here and not a SIGBUS later.
"""

from __future__ import annotations

import mmap
import os
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress

from mpi4py import MPI

from mpilm.log import UserError, warn


class SharedMemoryError(UserError):
    """This node cannot share memory of that size; raised on all its ranks. It is told where nobody has another way."""


def share(comm: MPI.Comm, nbytes: int, *, ways: Sequence[str]) -> mmap.mmap:
    """Map `nbytes` zeroed bytes that all ranks of `comm` see. Collective over `comm`, all on one host.

    Raises:
        SharedMemoryError: No way worked; says why each did not.
    """
    failures: list[str] = []
    for way in ways:
        block, failure = _try(comm, nbytes, way)
        if block is not None:
            if failures and comm.rank == 0:
                warn(f"{'; '.join(failures)}. Using {way} instead.")
            return block
        failures.append(failure)
    raise SharedMemoryError(f"The ranks of this node cannot share {nbytes / 2**20:.1f} MiB: {'; '.join(failures)}.")


def room(comm: MPI.Comm, *, ways: Sequence[str]) -> int:
    """Bytes that the ranks of `comm` can share, going by the first way that works at all. Collective over `comm`.

    No bound is known for "memfd"; a folder has the free space of its file system.
    """
    for way in ways:
        block, _ = _try(comm, mmap.PAGESIZE, way)
        if block is not None:
            status = None if way == "memfd" else os.statvfs(way)
            return sys.maxsize if status is None else status.f_bavail * status.f_frsize
    return 0


def _try(comm: MPI.Comm, nbytes: int, way: str) -> tuple[mmap.mmap | None, str]:
    """One way on all ranks: the block, or else the first rank's reason, the same answer everywhere."""
    descriptor, path, problem = -1, "", ""
    if comm.rank == 0:
        try:
            descriptor, path = _create(way)
            os.truncate(descriptor, nbytes)
        except OSError as error:
            problem = _reason(way, error)
    path, identity, problem = comm.bcast((path, _identity(descriptor), problem))
    block = None
    if not problem:
        try:
            descriptor = descriptor if comm.rank == 0 else os.open(path, os.O_RDWR)
            block = _map(descriptor, nbytes, identity, rank=comm.rank, size=comm.size)
        except (OSError, ValueError) as error:
            problem = _reason(way, error)
    problems = comm.gather(problem)
    if comm.rank == 0 and way != "memfd":
        with suppress(OSError):
            os.unlink(path)
    if descriptor >= 0:
        os.close(descriptor)
    problem = next(filter(None, comm.bcast(problems)), "")
    return (None, problem) if problem else (block, "")


def _create(way: str) -> tuple[int, str]:
    """An empty file and the path by which another process opens it."""
    if way == "memfd":
        descriptor = os.memfd_create("mpilm")
        return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"
    path = os.path.join(way, f"mpilm-{uuid.uuid4().hex}")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), path


def _identity(descriptor: int) -> tuple[int, int]:
    """What tells this file from any other that may stand at the same path in another container."""
    if descriptor < 0:
        return 0, 0
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _map(descriptor: int, nbytes: int, identity: tuple[int, int], *, rank: int, size: int) -> mmap.mmap:
    if _identity(descriptor) != identity:
        raise ValueError("it is another file: the ranks of this node do not see the same files or processes")
    low, high = nbytes * rank // size, nbytes * (rank + 1) // size
    if high > low:
        os.posix_fallocate(descriptor, low, high - low)
    return mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _reason(way: str, error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"shared memory by {way}: {text}"
