"""malloc's settings of a process that was started with the usual ones, changed later to what ours starts under.

MPI_Allreduce takes a buffer as large as the message in every call. glibc maps one of more than 32 MiB, unmaps it when
it is freed, and so every page is faulted in anew each time; under `startup.MALLOC` freed memory stays. (That also asks
for pages of 2 MiB, which cannot be done later.)
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # of mallopt(3)
UNLIMITED = 2**31 - 1


def keep_what_is_freed() -> bool:
    """From now on: there is no way back, for whoever allocates next finds what was kept.

    Returns:
        Whether this C library can; glibc can from 2.35 on.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, UNLIMITED) and mallopt(M_TRIM_THRESHOLD, UNLIMITED))
