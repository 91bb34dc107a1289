"""A rank that dies while MPI starts: the others tell of it and end, instead of waiting for ever.

    with within(launcher):
        start_mpi(launcher)

Where the launcher lets ranks outlive each other it does not end a job that has lost one, and inside MPI_Init there is
no communicator yet that anybody could revoke. So what has to happen there has a limit, and a thread that knows it.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn

from mpilm.failure import wait_until_read
from mpilm.log import UserError
from mpilm.placement import Launcher

VARIABLE = "MPILM_START_S"
# MPI starts in seconds; a file system that thousands of ranks read their libraries from takes minutes.
LIMIT_S, RANKS_PER_S = 300.0, 10
FAILED, STDERR = 1, 2


def active() -> bool:
    """Whether ranks outlive each other in this job."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable") == "1"  # noqa: SIM112 - Open MPI's name


def limit_s(ranks: int) -> float:
    """Seconds that so many ranks may take.

    Raises:
        UserError: The environment says something that is no number of seconds.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return LIMIT_S + ranks / RANKS_PER_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise UserError(f"{VARIABLE}={text}: unset it, or give the seconds that MPI may take to start, above 0.")
    return seconds


@contextmanager
def within(launcher: Launcher | None) -> Iterator[None]:
    """A part of the start that waits for other ranks: the program ends if it takes too long or stumbles over a death,
    with exit code 1 and who has waited. Nothing of this where the launcher ends the job by itself.

    Raises:
        UserError: See `limit_s`.
    """
    if launcher is None or not active():
        yield
        return
    limit = limit_s(launcher.size or 1)
    clock = threading.Timer(limit, _end, [launcher, f"waited {limit:g} s for it; {VARIABLE} sets the limit"])
    clock.daemon = True
    clock.start()
    try:
        yield
    except Exception as error:
        from mpi4py import MPI

        if not isinstance(error, MPI.Exception):
            raise
        clock.cancel()
        clock.join()    # if the time is up at this moment, the thread tells
        _end(launcher, str(error))
    finally:
        clock.cancel()


def _end(launcher: Launcher, reason: str) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.write(f"[rank {launcher.rank} on {socket.gethostname()}] error: a rank has died or is missing while MPI "
                     f"starts ({reason}); the same command starts again\n")
    sys.stderr.flush()
    wait_until_read(STDERR)
    os._exit(FAILED)    # mpirun ends the others; MPI_Abort would need an MPI that has started


def init_thread(MPI: ModuleType, level: int) -> None:
    """MPI.Init_thread, during which other threads run: mpi4py's keeps the interpreter's lock, also from the thread of
    `within`. Only where ranks outlive each other.

    Raises:
        MPI.Exception: It failed.
    """
    init = getattr(ctypes.CDLL(MPI.__file__), "MPI_Init_thread", None) if active() else None
    if init is None:
        MPI.Init_thread(level)
        return
    if code := init(None, None, level, ctypes.byref(ctypes.c_int())):
        raise MPI.Exception(code)
    for comm in (MPI.COMM_SELF, MPI.COMM_WORLD):    # as mpi4py does it: errors are exceptions
        comm.Set_errhandler(MPI.ERRORS_RETURN)
