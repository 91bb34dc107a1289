"""Peak memory of other processes while they work: proportional set size, sampled from outside.

A page that k processes map counts 1/k to each of them (PSS), which is what a process costs where ranks share memory;
the resident set size (RSS) would count it k times. The kernel keeps no peak of it, so it is sampled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

INTERVAL_S = 0.02
KIB = 1024


def pss(pid: int) -> int:
    """Bytes; 0 where the process is gone or may not be looked at."""
    return _rollup(pid, "Pss:")


def own(pid: int) -> int:
    """PSS without mapped files, libraries above all: those are the smaller the more programs of a kind there are."""
    return _rollup(pid, "Pss_Anon:", "Pss_Shmem:")


def _rollup(pid: int, *fields: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * KIB for line in lines if line.startswith(fields))


@contextmanager
def peak(pids: Sequence[int], of: Callable[[int], int] = pss) -> Iterator[list[int]]:
    """The list holds every process's peak in bytes, of the time that the context was entered."""
    peaks = [0] * len(pids)
    done = threading.Event()

    def sample() -> None:
        last = False
        while not last:  # at least once, however short the time
            last = done.wait(INTERVAL_S)
            peaks[:] = [max(most, of(pid)) for most, pid in zip(peaks, pids, strict=True)]

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def available() -> int:
    """Bytes that programs on this machine can still take."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * KIB
