"""Pipelines: ours by each schedule, data parallel on the same ranks, and torch.distributed.pipelining.

    mpirun -np 2 python -m mpilm.bench pipeline
    mpirun -np 2 python -m mpilm.bench pipeline --case wide --who mpilm-1f1b,torch-1f1b --emulated 0 --rounds 3

Contenders take turns as those of `bench train` do; `_pipelines/__init__.py` says who they are. A step has eight
micro-batches. Values are tokens/s over all ranks, medians over the rounds. Cases "... bubble of stage s" are the part
of the time of all passes in which that stage waited, messages included, in percent; "formula" is (p - 1) / (m + p - 1).

Cases "... emulated on 4 stages" need no cores: stages sleep for as long as real ones take (see _pipelines/emulated.py),
everything else is real. "... simulated" is what the simulator says of the same times.
"""

from __future__ import annotations

import statistics

from mpi4py import MPI

from mpilm.bench import _pipelines
from mpilm.bench._contenders import Case
from mpilm.bench._contest import Emit, emit_speed, measure, parse_cases, shared_cores
from mpilm.bench._rounds import Plan, Results

OURS = tuple(name for name in _pipelines.names() if name.startswith("mpilm"))
FORMULA = "formula"


def run(comm: MPI.Comm, emit: Emit, *, case: str, who: str, emulated: int, rounds: int, steps: int) -> None:
    """Measure. Collective over `comm`.

    Args:
        comm: Its ranks' cores are what every contender gets; all on one machine.
        emit: Gets (case, who, value, unit).
        case: Names of cases, with commas between.
        who: Names of contenders, with commas between.
        emulated: Stages of the emulation; 0: none.
        rounds: Turns of every contender.
        steps: Timed steps of a turn.

    Raises:
        UserError: An unknown case or contender, or ranks on several machines.
    """
    cases, cores = parse_cases(case), shared_cores(comm)
    real = [_pipelines.who(name) for name in who.split(",") if name]
    plan = Plan(rounds=rounds, steps=steps)
    for one in cases:
        results = measure(comm, one, real, cores, plan)
        emit_speed(emit, one, results)
        _emit_bubbles(emit, one, results, comm.size)
        if emulated:
            asleep = measure(comm, one, [_pipelines.EMULATED], cores, plan, size=emulated)
            _emit_emulated(emit, one, asleep, emulated)


def _emit_bubbles(emit: Emit, case: Case, results: Results, ranks: int) -> None:
    for stage in range(ranks):
        shares = {name: _share(rounds, stage) for name, rounds in results.told.items()
                  if "-dp" not in name and rounds[0][stage]}
        for name, share in shares.items():
            emit(f"{case.name} bubble of stage {stage}", name, 100 * share, "%")
        if shares:
            emit(f"{case.name} bubble of stage {stage}", FORMULA, 100 * _formula(case, ranks), "%")


def _emit_emulated(emit: Emit, case: Case, results: Results, stages: int) -> None:
    block = f"{case.name} emulated on {stages} stages"
    for rounds in results.told.values():
        for name in _pipelines.ASLEEP:
            seconds = statistics.median(max(told[f"{name} passes"] for told in everyone) for everyone in rounds)
            emit(f"{block}: passes", f"mpilm-{name}", 1e3 * seconds, "ms a turn")
        for name in _pipelines.ASLEEP:
            share = statistics.mean(_share(rounds, stage, f"{name} ") for stage in range(stages))
            emit(f"{block}: bubble", f"mpilm-{name}", 100 * share, "%")
            emit(f"{block}: bubble", f"{name} simulated", 100 * _share(rounds, 0, f"{name} simulated "), "%")
        emit(f"{block}: bubble", FORMULA, 100 * _formula(case, stages), "%")


def _share(rounds: list[list[dict[str, float]]], stage: int, prefix: str = "") -> float:
    """The part of its time that a stage waited, median over the rounds."""
    return statistics.median(told[stage][f"{prefix}waits"] / told[stage][f"{prefix}passes"] for told in rounds)


def _formula(case: Case, stages: int) -> float:
    """What a stage waits in gpipe and 1f1b, of all its time, with free messages and stages that are alike."""
    return (stages - 1) / (min(_pipelines.MICRO_BATCHES, case.global_batch_size) + stages - 1)
