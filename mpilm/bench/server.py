"""Parameter servers: a server and a worker beside one rank, a server beside bare MPI, and what staleness is worth.

    mpirun -np 4 python -m mpilm.bench server
    mpirun -np 2 python -m mpilm.bench server --case wide --rounds 7

Case by case:
- the name of a model: tokens/s of a server and a worker, and of allreduce on one rank; two processes on a core each,
  which take turns as those of `bench train` do (`_servers/__init__.py` says who they are)
- "update of ... MiB": milliseconds of an update of all workers, on the slowest rank: receive, add, norm, AdamW, send;
  "bare" receives and adds the same bytes and sends as many back, and does nothing else
- "one slow worker", "anyone slow at times": steps/s of all workers together, which sleep instead of computing and so
  need no cores, under bounds on how far one may be ahead; from three ranks on
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from mpi4py import MPI

from mpilm.bench import _servers
from mpilm.bench._contenders import CASES, Case, Who
from mpilm.bench._contest import on_root_quietly, pinned, shared_cores
from mpilm.bench._rounds import Plan, Results, compete
from mpilm.bench.measure import interleaved
from mpilm.log import UserError

OURS = ("mpilm-server", "mpilm-server-fp32")
Emit = Callable[[str, str, float, str], None]
MIB = 2**20
FLOAT_BYTES = 4
SLEEPERS_MIB = 1    # of gradients, where workers sleep
STEPS, SLOW = 24, 4.0


def run(comm: MPI.Comm, emit: Emit, *, case: str, who: str, rounds: int, steps: int, mib: int,
        sleep_ms: int) -> None:
    """Measure. Collective over `comm`.

    Args:
        comm: One rank is the server; all on one machine.
        emit: Gets (case, who, value, unit).
        case: Names of models, with commas between; empty: none.
        who: Names of contenders, with commas between.
        rounds: Turns of every contender.
        steps: Timed steps of a turn.
        mib: Of the gradients of an update.
        sleep_ms: What a step takes a worker that sleeps.

    Raises:
        UserError: An unknown case or contender, one rank only, or ranks on several machines.
    """
    if comm.size == 1:
        raise UserError("A server needs a worker: start 2 ranks or more.")
    cases, whos = [_case(name) for name in case.split(",") if name], [_servers.who(name) for name in who.split(",")]
    plan, cores = Plan(rounds=rounds, steps=steps), shared_cores(comm)
    for one in cases:
        results = _results(comm, one, whos, cores, plan)
        for name in results.names():
            emit(one.name, name, results.median(name), "tokens/s")
    _updates(comm, emit, mib, rounds)
    if comm.size > 2:
        _curves(comm, emit, rounds, sleep_ms / 1e3)


def _case(name: str) -> Case:
    if name not in CASES:
        raise UserError(f"--case {name}: there is no such case; there are {', '.join(CASES)}.")
    return CASES[name]


def _results(comm: MPI.Comm, case: Case, whos: list[Who], cores: tuple[int, ...], plan: Plan) -> Results:
    def measure() -> Results:
        with pinned(cores):
            return compete(case, whos, cores=cores, size=_servers.PROCESSES, plan=plan)

    return on_root_quietly(comm, measure)


def _updates(comm: MPI.Comm, emit: Emit, mib: int, rounds: int) -> None:
    from mpilm.bench._serving import Emulation, bare

    count = mib * MIB // FLOAT_BYTES
    emulation = Emulation(comm, count)
    contenders = {"mpilm-server": emulation.step, "bare": bare(comm, count)}
    seconds = interleaved(comm, contenders, rounds=3 * rounds, warmup=2)
    emulation.free()
    for name, value in seconds.items():
        emit(f"update of {mib} MiB by {comm.size - 1} workers", name, 1e3 * value, "ms")


def _curves(comm: MPI.Comm, emit: Emit, rounds: int, sleep_s: float) -> None:
    from mpilm.bench._serving import Pace, choices, pace

    count = SLEEPERS_MIB * MIB // FLOAT_BYTES
    plans = {"nobody slow": Pace(STEPS, sleep_s, 1.0), "one slow worker": Pace(STEPS, sleep_s, SLOW),
             "anyone slow at times": Pace(STEPS, sleep_s, SLOW, anyone=True)}
    for name, plan in plans.items():
        seen: dict[str, list[float]] = {who: [] for who, _ in choices()}
        for _ in range(rounds):
            for who, staleness in choices():
                seen[who].append(pace(comm, count, staleness, plan))
        for who, rates in seen.items():
            emit(name, who, statistics.median(rates), "steps/s")
