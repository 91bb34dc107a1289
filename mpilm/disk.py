"""How much room a disk has."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from mpilm.log import counted

FULL = (errno.ENOSPC, errno.EDQUOT)


def free_bytes(directory: Path) -> int:
    """Bytes that an ordinary user may still write there.

    Raises:
        OSError: It can't be asked.
    """
    facts = os.statvfs(directory)
    return facts.f_bavail * facts.f_frsize


def require(directory: Path, needed: int) -> None:
    """Make sure that there is room for so many bytes, before any of them is written.

    Raises:
        OSError: There is not (ENOSPC).
    """
    told = os.statvfs(directory).f_blocks > 0   # some file systems do not tell
    if told and free_bytes(directory) < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def free(path: Path) -> str:
    """What is free where `path` is, or would be, for a person."""
    existing = next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))
    try:
        return readable(free_bytes(existing))
    except OSError as error:
        return f"an unknown number ({error.strerror})"


def readable(count: int) -> str:
    """A number of bytes for a person: 1234567 -> "1.2 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return counted(count, "byte")
