"""Interleaved measurement: contenders take turns, so that a drifting machine is the same to all.

    seconds = interleaved(comm, {"ring": lambda: ring.allreduce(a), "mpi": lambda: mpi.allreduce(b)}, rounds=9)

A round runs every contender once, in an order that rotates from round to round. Its time is that of the slowest rank,
from a barrier on. Reported are medians over the rounds; the first rounds warm up and do not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from mpi4py import MPI


def interleaved(
    comm: MPI.Comm, contenders: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, repeats: int = 1
) -> dict[str, float]:
    """Median seconds of one call of each contender, of the slowest rank. Collective over `comm`.

    Args:
        comm: Everyone calls with the same contenders in the same order.
        contenders: What to time, by name.
        rounds: Rounds that count.
        warmup: Rounds before them that don't.
        repeats: Calls between two looks at the clock; more than one for what takes microseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(warmup + rounds):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            seconds = timed(comm, contenders[name], repeats=repeats)
            if turn >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(seen) for name, seen in times.items()}


def timed(comm: MPI.Comm, call: Callable[[], object], *, repeats: int = 1) -> float:
    """Seconds of one call, of the slowest rank; everyone starts together. Collective over `comm`."""
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return float(comm.allreduce((time.perf_counter() - start) / repeats, op=MPI.MAX))


def busbw(nbytes: int, seconds: float, size: int) -> float:
    """Bus bandwidth of an allreduce in GB/s as nccl-tests defines it: bytes / time * 2 (size - 1) / size."""
    return nbytes / seconds * 2 * (size - 1) / size / 1e9
