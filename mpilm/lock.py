"""Keeps a second program out of a folder. The lock goes with the process, however it ends.

    with locked(Path("runs/demo/.lock"), wait_s=10, otherwise="give another --run.dir"):
        ...

Where a file system has no locks nobody is kept out.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpilm.log import UserError
from mpilm.named import named
from mpilm.progress import Work


@contextmanager
def locked(path: Path, *, wait_s: float, otherwise: str) -> Iterator[None]:
    """Hold the lock of `path`: a file, made where it is missing and left there, or a folder.

    Args:
        path: What is locked. A file says who holds it.
        wait_s: How long to wait for another process; one that was killed may take a moment to end.
        otherwise: What to do instead of waiting, for the message.

    Raises:
        UserError: Another process held it all the time.
        OSError: It cannot be made or opened.
    """
    folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + wait_s
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                place, who = (path, "") if folder else (path.parent, _holder(descriptor))
                raise UserError(f"{place}: another process is writing there{who}. Wait for it, or {otherwise}.")
            Work.done += 1  # this wait has an end of its own: it is no hang
            time.sleep(0.1)
        if not folder:
            with named(path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    who = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
    return f" ({who})" if who else ""


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
