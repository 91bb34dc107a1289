"""Memory divided over replicas: ours at every level, ours undivided, and FSDP2 over Gloo.

    mpirun -np 2 python -m mpilm.bench sharded
    mpirun -np 2 python -m mpilm.bench sharded --case wide --who mpilm-allreduce,mpilm-sharded1 --rounds 7

Contenders take turns as those of `bench train` do; `_shardings/__init__.py` says who they are. Values are tokens/s over
all ranks, medians over the rounds; cases "... peak PSS" and "... peak RSS" are MiB of the largest process: its share of
what processes map together, in steps after warming up; and all that it ever mapped.
"""

from __future__ import annotations

from collections.abc import Callable

from mpi4py import MPI

from mpilm.bench import _shardings
from mpilm.bench._contenders import CASES, Case, Who
from mpilm.bench._rounds import Plan, Results, compete
from mpilm.bench.train import on_root_quietly, pinned, shared_cores
from mpilm.log import UserError

OURS = tuple(name for name in _shardings.names() if name.startswith("mpilm"))
Emit = Callable[[str, str, float, str], None]
MIB = 2**20


def run(comm: MPI.Comm, emit: Emit, *, case: str, who: str, rounds: int, steps: int) -> None:
    """Measure. Collective over `comm`.

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
    cases, whos = [_case(name) for name in case.split(",")], [_shardings.who(name) for name in who.split(",")]
    plan, cores = Plan(rounds=rounds, steps=steps), shared_cores(comm)
    for one in cases:
        results = _results(comm, one, whos, cores, plan)
        for name in results.names():
            emit(one.name, name, results.median(name), "tokens/s")
        for name in results.names():
            emit(f"{one.name} peak PSS", name, results.peak_pss[name] / MIB, "MiB")
            emit(f"{one.name} peak RSS", name, results.max_rss[name] / MIB, "MiB")


def _case(name: str) -> Case:
    if name not in CASES:
        raise UserError(f"--case {name}: there is no such case; there are {', '.join(CASES)}.")
    return CASES[name]


def _results(comm: MPI.Comm, case: Case, whos: list[Who], cores: tuple[int, ...], plan: Plan) -> Results:
    def measure() -> Results:
        with pinned(cores):
            return compete(case, whos, cores=cores, size=comm.size, plan=plan)

    return on_root_quietly(comm, measure)
