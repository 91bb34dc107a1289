"""Keeps a second program out of a folder. Locks go with their processes, however these end.

    with locked(Path("tokens"), wait_s=10, otherwise="give another --to"):
        ...

    claim = Claim(Path("runs/demo"), wait_s=5, otherwise="give another --run.dir")     a job of many ranks
    claim.lead(alone=True)      on one rank
    claim.follow()              then on all of them, that one too

A job may lose the rank that leads, and another one of it must then find the lead free, whoever waits for it. So every
rank also shares in a second lock, and no other job may lead as long as any rank of this one lives.

    .lock           exclusive, the rank that leads; says who it is
    .lock.ranks     shared by all ranks; one that wants to lead a new job has it alone for a moment

Where a file system has no locks nobody is kept out, which is told.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from mpilm.log import UserError, warn
from mpilm.named import named
from mpilm.progress import Work

LOCK, RANKS = ".lock", ".lock.ranks"
NAP_S = 0.1


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
    lock = Lock(path)
    try:
        _wait(lock.take, path, wait_s=wait_s, otherwise=otherwise)
        yield
    finally:
        lock.release()


class Claim:
    """A job's claim to a folder, as one rank of it has it. Local, like every method.

    Args:
        folder: Must be there whenever a method is called.
        wait_s: How long to wait for another job; one that was killed may take a moment to end.
        otherwise: What to do instead of waiting, for the message.
    """

    def __init__(self, folder: Path, *, wait_s: float, otherwise: str) -> None:
        self.lock, self.ranks = Lock(folder / LOCK), Lock(folder / RANKS, shared=True)
        self.wait_s, self.otherwise = wait_s, otherwise

    @property
    def follows(self) -> bool:
        """Whether this rank shares in the lock of its job; not if the folder was removed since, and made again."""
        return self.ranks.held

    def lead(self, *, alone: bool) -> None:
        """Keep every other job out.

        Args:
            alone: No rank of this job follows yet.

        Raises:
            UserError: Another job was there all the time.
            OSError: A file cannot be made or opened.
        """
        self._wait(self._begin if alone and not self.lock.held else self.lock.take)

    def follow(self) -> None:
        """Have no other job lead as long as this rank lives. Raises as `lead` does."""
        self._wait(self.ranks.take)

    def release(self) -> None:
        """Let others in."""
        self.lock.release()
        self.ranks.release()

    def _wait(self, take: Callable[[], bool]) -> None:
        _wait(take, self.lock.path, wait_s=self.wait_s, otherwise=self.otherwise)

    def _begin(self) -> bool:
        """Lead, if there is no rank of another job; nothing is held between two tries, which others may wait for."""
        everyone = Lock(self.ranks.path)
        try:
            return everyone.take() and self.lock.take()
        finally:
            everyone.release()


class Lock:
    """A lock of a file, made where it is missing, or of a folder.

    Args:
        shared: With all others that want it shared. A file says who has it for himself.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path, self.shared, self.descriptor = path, shared, -1

    @property
    def held(self) -> bool:
        """Whether it is, of what is there now by this name."""
        if self.descriptor < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def take(self) -> bool:
        """Whether it is ours now, without waiting.

        Raises:
            OSError: It cannot be made or opened.
        """
        if self.held:
            return True
        self.release()
        folder = self.path.is_dir()
        self.descriptor = os.open(self.path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            taken = _try_lock(self.descriptor, fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX, self.path.parent)
            if not taken or not self.held:  # somebody removed it meanwhile
                self.release()
                return False
            if not folder and not self.shared:
                with named(self.path):
                    os.ftruncate(self.descriptor, 0)
                    os.pwrite(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return True
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let others have it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _wait(take: Callable[[], bool], path: Path, *, wait_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + wait_s
    while not take():
        if time.monotonic() > deadline:
            place, who = (path, "") if path.is_dir() else (path.parent, _holder(path))
            raise UserError(f"{place}: another process is writing there{who}. Wait for it, or {otherwise}.")
        Work.done += 1  # this wait has an end of its own: it is no hang
        time.sleep(NAP_S)


def _holder(path: Path) -> str:
    try:
        with path.open(errors="replace") as file:
            who = file.read(200).strip()
    except FileNotFoundError:
        who = ""
    return f" ({who})" if who else ""


def _try_lock(descriptor: int, kind: int, place: Path) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _no_locks(place, error.strerror)
    return True


@cache
def _no_locks(place: Path, why: str) -> None:
    """Say it once."""
    warn(f"{place}: this file system has no locks ({why}), so nothing keeps a second program out. Start one at a time.")
