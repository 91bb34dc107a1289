"""malloc's settings of a process that was started with the usual ones, changed later to what ours starts under.

MPI and Gloo take a buffer as large as the message in every call. glibc maps one of more than 32 MiB, unmaps it when it
is freed, and so every page is faulted in anew each time; under `startup.MALLOC` freed memory stays.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # of mallopt(3)
UNLIMITED = 2**31 - 1


def keep_what_is_freed() -> None:
    """From now on: there is no way back, for whoever allocates next finds what was kept. Without glibc: nothing."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, UNLIMITED)
        libc.mallopt(M_TRIM_THRESHOLD, UNLIMITED)
