"""What benchmarks have in common in which contenders take turns: cases, cores, who measures, which figures come out.

    cases, cores = parse_cases("reference,wide"), shared_cores(comm)
    results = measure(comm, cases[0], whos, cores, Plan(rounds=5, steps=4))      # the contenders run, started by rank 0
    emit_speed(emit, cases[0], results)
    emit_memory(emit, cases[0], results)

`contest` is all of this, for benchmarks that want nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from mpi4py import MPI

from mpilm import placement
from mpilm.bench._contenders import CASES, Case, Who
from mpilm.bench._rounds import Plan, Results, compete
from mpilm.launch import on_root
from mpilm.log import UserError

T = TypeVar("T")
Emit = Callable[[str, str, float, str], None]     # (case, who, value, unit)
POLL_S = 0.05
MIB = 2**20


def contest(comm: MPI.Comm, emit: Emit, menu: Callable[[str], Who], *, case: str, who: str, rounds: int,
            steps: int) -> None:
    """Measure speed and memory. Collective over `comm`.

    Args:
        comm: Its ranks' cores are what every contender gets; all on one machine.
        emit: Gets (case, who, value, unit).
        menu: Takes a contender's name apart.
        case: Names of cases, with commas between.
        who: Names of contenders, with commas between.
        rounds: Turns of every contender.
        steps: Timed steps of a turn.

    Raises:
        UserError: An unknown case or contender, or ranks on several machines.
    """
    cases, whos = parse_cases(case), [menu(name) for name in who.split(",")]
    plan, cores = Plan(rounds=rounds, steps=steps), shared_cores(comm)
    for one in cases:
        results = measure(comm, one, whos, cores, plan)
        emit_speed(emit, one, results)
        emit_memory(emit, one, results)


def parse_cases(names: str) -> list[Case]:
    """Those of `names`, with commas between.

    Raises:
        UserError: There is no such case.
    """
    return [_case(name) for name in names.split(",")]


def _case(name: str) -> Case:
    if name not in CASES:
        raise UserError(f"--case {name}: there is no such case; there are {', '.join(CASES)}.")
    return CASES[name]


def shared_cores(comm: MPI.Comm) -> tuple[int, ...]:
    """The physical cores that the ranks of `comm` have together. Collective over `comm`.

    Raises:
        UserError: The ranks are not on one machine.
    """
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    alone = comm.allreduce(node.size, op=MPI.MIN) == comm.size
    node.Free()
    if not alone:
        raise UserError("The training benchmark compares on one machine: start all its ranks there.")
    return tuple(sorted({core for cores in comm.allgather(placement.cores()) for core in cores}))


def measure(comm: MPI.Comm, case: Case, whos: Sequence[Who], cores: tuple[int, ...], plan: Plan, *,
            size: int = 0) -> Results:
    """Let contenders of `size` processes (0: as many as `comm` has ranks) take turns. Collective over `comm`."""
    def run() -> Results:
        with pinned(cores):
            return compete(case, whos, cores=cores, size=size or comm.size, plan=plan)

    return on_root_quietly(comm, run) if whos else Results()


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """This process on `cores`, which its children inherit: mpirun may have bound it to one of them."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def on_root_quietly(comm: MPI.Comm, function: Callable[[], T]) -> T:
    """`on_root` for what takes long: the other ranks sleep meanwhile, a blocked MPI call would use up their core."""
    outcome: list[T] = []
    error: Exception | None = None
    if comm.rank == 0:
        try:
            outcome.append(function())
        except Exception as failure:  # told to all ranks below
            error = failure
    gate = comm.Ibarrier()
    while not gate.Test():
        time.sleep(POLL_S)

    def result() -> T:
        if error is not None:
            raise error
        return outcome[0]

    return on_root(comm, result)


def emit_speed(emit: Emit, case: Case, results: Results) -> None:
    """Tokens/s over all ranks, the median of the rounds."""
    for name in results.names():
        emit(case.name, name, results.median(name), "tokens/s")


def emit_memory(emit: Emit, case: Case, results: Results) -> None:
    """MiB of the largest process: its share of what processes map together, in steps after warming up (PSS); and all
    that it ever mapped (RSS)."""
    for name in results.names():
        emit(f"{case.name} peak PSS", name, results.peak_pss[name] / MIB, "MiB")
        emit(f"{case.name} peak RSS", name, results.max_rss[name] / MIB, "MiB")
