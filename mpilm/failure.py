"""How a failing rank ends the whole job: within seconds, with its own words first, and never with exit code 0.

    a bug (any exception, on any thread)    the rank's traceback, labelled with rank and host, then MPI_Abort: code 1
    UserError on every rank                 the message, once, without a traceback; every rank exits with code 2
    UserError on some ranks only            after a moment's grace the same message, labelled, then MPI_Abort: code 2
    a file system that refuses              as a UserError: a full disk is no bug of the program
    EndError on every rank                  the words, once; every rank exits with its code
    a non-zero SystemExit, on any thread    labelled, then MPI_Abort with its code
    sys.exit(0) on some ranks only          they wait for the others, and say so after a while
    Ctrl-C                                  "interrupted"; code 130

An exception on one rank must not leave the others waiting in a collective for ever, so none of this is optional. It
holds inside `launch.session`.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import stat
import sys
import termios
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mpilm import marks
from mpilm.log import UserError, note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpi4py import MPI

T = TypeVar("T")
USER_ERROR, INTERRUPTED = 2, 130
GRACE_S = 3.0
PATIENCE_S = 30.0   # for those who have not called sys.exit(0)
READ_S = 2.0
PASSED_ON_S, NAPS = 0.05, 6  # several short naps: on a busy machine each of them is longer, as the launcher's turns are
STDERR = 2
# What a file system says for reasons of its own. ENOENT is not among them: that may well be our mistake.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EROFS, errno.EACCES, errno.EPERM,
            errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EMFILE, errno.ENFILE}


class EndError(Exception):
    """All ranks end here, with an exit code and words for it that are no error. Raised on all of them."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class RankError(RuntimeError):
    """Another rank's error, raised here so that all ranks end together. `origin` is that rank: it tells the story."""

    def __init__(self, text: str, origin: int = 0) -> None:
        super().__init__(text)
        self.origin = origin

    def __reduce__(self) -> tuple[Any, ...]:
        return RankError, (str(self), self.origin)


def on_root(comm: MPI.Comm, function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and return its result on every rank. Collective over `comm`.

    What it returns must be small and picklable. What only rank 0 can see going wrong becomes an error of all.

    Raises:
        UserError: As rank 0 raised it, on every rank; also for an OSError.
        RankError: On the other ranks, when rank 0 raised anything else.
    """
    value, error = None, None
    if comm.rank == 0:
        try:
            value = function()
        except Exception as caught:
            error = as_mistake(caught, OSError) or caught
    value, text, mistake = comm.bcast((value, _text(error), isinstance(error, UserError)))
    if error is not None:
        raise error
    if text is not None:
        raise UserError(text) if mistake else RankError(text, origin=0)
    return value


def agree(comm: MPI.Comm, error: Exception | None) -> None:
    """Raise on all ranks when any rank hands in an error. Collective over `comm`.

    Raises:
        UserError: Every error was a UserError or an OSError; the message names the ranks, unless all say the same.
        RankError: Another kind of error; the rank that has it raises its own.
    """
    mistake = isinstance(error, UserError | OSError)
    verdicts = [(rank, verdict) for rank, verdict in enumerate(comm.allgather((_text(error), mistake))) if verdict[0]]
    if not verdicts:
        return
    if all(mistake for _, (_, mistake) in verdicts):
        raise UserError(_summary([(rank, str(text)) for rank, (text, _) in verdicts], comm.size)) from error
    if error is not None and not mistake:
        raise error
    rank, (text, _) = next((rank, verdict) for rank, verdict in verdicts if not verdict[1])
    raise RankError(f"rank {rank}: {text}", origin=rank)


def as_mistake(error: BaseException, kind: type[OSError] | None = None) -> UserError | None:
    """What to tell without a traceback; None for a bug. An OSError counts if it is one of REFUSALS, or a `kind`."""
    if isinstance(error, OSError) and (error.errno in REFUSALS or (kind and isinstance(error, kind))):
        place = error.filename or "a file that this program reads or writes"
        return UserError(f"{place}: {error.strerror or error}. When that is mended, the same command goes on.")
    return error if isinstance(error, UserError) else None


def _text(error: Exception | None) -> str | None:
    if error is None:
        return None
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _summary(verdicts: list[tuple[int, str]], size: int) -> str:
    """The distinct messages, each with the ranks that gave it."""
    ranks: dict[str, list[int]] = {}
    for rank, text in verdicts:
        ranks.setdefault(text, []).append(rank)
    if len(ranks) == 1 and len(verdicts) == size:
        return verdicts[0][1]
    return "\n".join(f"rank {', '.join(map(str, who[:8]))}{' ...' * (len(who) > 8)}: {text}"
                     for text, who in ranks.items())


class Guard:
    """Watches over one rank: as a context it turns whatever leaves its body into the end of the job.

    Args:
        comm: For the verdicts alone, so that they never match the program's own messages.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm = comm
        self.label = f"[rank {comm.rank} on {socket.gethostname()}]"
        self._thread_hook = threading.excepthook

    def __enter__(self) -> Guard:
        threading.excepthook = self._thread_failed
        if self.comm.rank == 0:
            marks.write(marks.STARTED)
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        """Leave together: returns when every rank's body has ended well, otherwise ends the job."""
        threading.excepthook = self._thread_hook
        if error is None:
            self._leave(0, None, grace_s=float("inf"))
        elif isinstance(error, SystemExit) and error.code in (None, 0):
            with _told_after(PATIENCE_S, f"{self.label} has called sys.exit(0) and waits for the other ranks, which "
                                         "may be waiting for it"):
                self._leave(0, None, grace_s=float("inf"))
        elif mistake := as_mistake(error):
            self._leave(USER_ERROR, f"error: {mistake}", grace_s=GRACE_S)
        elif isinstance(error, EndError):
            self._leave(error.code, str(error), grace_s=GRACE_S)
        elif isinstance(error, KeyboardInterrupt):
            self._leave(INTERRUPTED, "interrupted", grace_s=GRACE_S)
        elif isinstance(error, SystemExit):
            self._abort(_code(error), f"exits with {error.code!r}")
        else:
            if isinstance(error, RankError) and error.origin != self.comm.rank:
                time.sleep(GRACE_S)  # the rank that knows more speaks first, and ends us all
            self._abort(1, _traceback(error))

    def _verdicts(self, code: int, text: str | None, *, grace_s: float) -> list[tuple[int, str | None]]:
        gate, deadline = self.comm.Ibarrier(), time.monotonic() + grace_s
        while not gate.Test():
            if time.monotonic() > deadline:
                self._abort(code, text or "")
            time.sleep(0.002)
        return self.comm.allgather((code, text))

    def _leave(self, code: int, text: str | None, *, grace_s: float) -> None:
        from mpi4py import MPI

        try:
            verdicts = self._verdicts(code, text, grace_s=grace_s)
        except MPI.Exception:   # somebody died on the way out, and the others leave all the same
            if code == USER_ERROR:      # of which they do not hear here: they would wait for this rank
                self._abort(code, text or "")
            verdicts = [(code, text)]
        codes = [code for code, _ in verdicts]
        if any(codes):
            if self.comm.rank == 0:
                told = [(rank, text) for rank, (_, text) in enumerate(verdicts) if text is not None]
                words = _summary(told, len(verdicts))
                note(words)
                _print(words)
                wait_until_read(STDERR)
            raise SystemExit(max(codes))
        if self.comm.rank == 0:
            marks.write(marks.ENDED)

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        error, name = failed.exc_value, failed.thread.name if failed.thread else "?"
        if isinstance(error, SystemExit):
            if error.code not in (None, 0):
                self._abort(_code(error), f"in thread {name}: exits with {error.code!r}")
        elif error is not None:
            if mistake := as_mistake(error):
                self._abort(USER_ERROR, f"error: in thread {name}: {mistake}")
            self._abort(1, f"in thread {name}:\n{_traceback(error)}")

    def _abort(self, code: int, text: str) -> NoReturn:
        from mpi4py import MPI

        _print(f"{self.label} {text}")
        wait_until_read(STDERR)
        code = code & 0xFF or 1     # a system keeps no more of it, and 256 would be 0
        MPI.COMM_WORLD.Abort(code)
        os._exit(code)


@contextmanager
def _told_after(seconds: float, text: str) -> Iterator[None]:
    """Say so unless this block ends before."""
    timer = threading.Timer(seconds, _print, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _code(error: SystemExit) -> int:
    return error.code if isinstance(error.code, int) else 1


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _print(text: str) -> None:
    """One write, so that the words of several ranks do not mix, after what was printed before."""
    with suppress(OSError, ValueError):     # it may be full or closed: the reason is told all the same
        sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def wait_until_read(descriptor: int) -> None:
    """Let the launcher pass our words on: it hears of the abort by another way, often sooner, and speaks itself."""
    try:
        unread = array.array("i", [1])
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return
        deadline = time.monotonic() + READ_S
        while unread[0] and time.monotonic() < deadline:
            time.sleep(0.005)
            fcntl.ioctl(descriptor, termios.FIONREAD, unread)
        for _ in range(NAPS):
            time.sleep(PASSED_ON_S)
    except OSError:
        return
