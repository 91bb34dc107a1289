"""Training steps: ours and PyTorch's own ways to train the same model on the same batch, on the same cores.

    mpirun -np 2 python -m mpilm.bench train                                    # both cases, everyone: half an hour
    mpirun -np 2 python -m mpilm.bench train --case wide --who mpilm,ddp,single --rounds 3

Every contender is a program of its own, started once and warmed up, which then waits for its turns (see _jobs.py and
_rounds.py). "ddp" and "fsdp2" are a process a rank with the rank's cores, "single" is one process with all of them;
"-compile" is torch.compile, "-tuned" the malloc settings that ours starts under. Values are tokens/s over all ranks,
medians over the rounds. Cases "... peak PSS" and "... peak RSS" are MiB of the largest process: its share of what
processes map together, in steps after warming up; and all that it ever mapped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from mpi4py import MPI

from mpilm import placement
from mpilm.bench import _contenders
from mpilm.bench._contenders import CASES, Case, Who
from mpilm.bench._rounds import Plan, Results, compete, reference
from mpilm.launch import on_root
from mpilm.log import UserError

T = TypeVar("T")
OURS = ("mpilm", "mpilm-reproducible")
Emit = Callable[[str, str, float, str], None]
POLL_S = 0.05
MIB = 2**20


def run(comm: MPI.Comm, emit: Emit, *, case: str, who: str, rounds: int, steps: int) -> str:
    """Measure; returns a table with ratios to ddp and to the best peer. Collective over `comm`.

    Args:
        comm: Its ranks' cores are what every contender gets; all on one machine.
        emit: Gets (case, who, value, unit).
        case: Names of cases, with commas between.
        who: Names of contenders, with commas between.
        rounds: Turns of every contender.
        steps: Timed steps of a turn.

    Raises:
        UserError: An unknown case or contender, or ranks on several machines.
    """
    cases, whos = [_case(name) for name in case.split(",")], [_contenders.parse(name) for name in who.split(",")]
    plan, cores = Plan(rounds=rounds, steps=steps), shared_cores(comm)
    return "\n\n".join(_one_case(comm, emit, one, whos, plan, cores) for one in cases)


def _one_case(
    comm: MPI.Comm, emit: Emit, case: Case, whos: Sequence[Who], plan: Plan, cores: tuple[int, ...]
) -> str:
    def measure() -> Results:
        with pinned(cores):
            return compete(case, whos, cores=cores, size=comm.size, plan=plan)

    results = on_root_quietly(comm, measure)
    _emit(case, results, emit)
    return table(case, results, plan, size=comm.size, threads=max(1, len(cores) // comm.size))


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


def _emit(case: Case, results: Results, emit: Emit) -> None:
    for name in results.names():
        emit(case.name, name, results.median(name), "tokens/s")
    for name in results.names():
        emit(f"{case.name} peak PSS", name, results.peak_pss[name] / MIB, "MiB")
        emit(f"{case.name} peak RSS", name, results.max_rss[name] / MIB, "MiB")


def table(case: Case, results: Results, plan: Plan, *, size: int, threads: int) -> str:
    """One row a contender: tokens/s, ratios with their spread over the rounds, memory."""
    names = results.names()
    if not names:
        return f"{case.name}: nobody could be measured"
    base = reference(names)
    peers = [name for name in names if name not in OURS] or names
    best = max(peers, key=lambda name: results.ratio(name, base, by=base))
    head = (f"{case.name}: {case.layers} layers, width {case.width}, {case.global_batch_size} x {case.sequence_length} "
            f"tokens a step; {size} ranks x {threads} threads; medians of {plan.rounds} rounds of {plan.steps} steps, "
            f"{results.num_groups} groups; best peer: {best}")
    rows = [["", "tokens/s", f"/{base}", "least - most", "/best peer", "peak PSS", "peak RSS MiB"]]
    for name in names:
        seen = results.ratios(name, base)
        rows.append([name, f"{results.median(name):,.0f}", f"{results.ratio(name, base, by=base):.2f}",
                     f"{min(seen):.2f} - {max(seen):.2f}", f"{results.ratio(name, best, by=base):.2f}",
                     f"{results.peak_pss[name] / MIB:,.0f}", f"{results.max_rss[name] / MIB:,.0f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([head, *lines])
