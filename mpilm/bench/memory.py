"""Memory of a rank, as the arithmetic predicts it and as it is: parallel/footprint.py beside what a job needs.

    mpirun -np 2 python -m mpilm.bench memory
    mpirun -np 2 python -m mpilm.bench memory --who whole,pp2,tp2,dp4-level3-ring

Layouts have ranks of their own, however many; `_layouts/__init__.py` says how they are named. Each is a job by itself,
one after the other, and what counts is its rank that needs most: the peak of its own memory and of its part of what
ranks share, in steps after warming up, above what a job of as many ranks needs for a model of nearly nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

from mpi4py import MPI

from mpilm.bench import _layouts, _memory
from mpilm.bench._contenders import CASES, Case, Who
from mpilm.bench._contest import MIB, Emit, on_root_quietly, parse_cases, pinned, shared_cores
from mpilm.bench._jobs import Job
from mpilm.bench._rounds import progress

OURS: tuple[str, ...] = ()
WARMUP_STEPS = 2
STEPS = 2
Row = tuple[str, int, float, float]     # layout, ranks, MiB predicted and measured


def run(comm: MPI.Comm, emit: Emit, *, case: str, who: str) -> str:
    """Predict and measure. Collective over `comm`.

    Args:
        comm: Its ranks' cores are what the jobs get; all on one machine.
        emit: Gets (case, who, value, unit): predicted and measured in MiB, the difference in % of what was measured.
        case: Names of cases, with commas between.
        who: Layouts, with commas between.

    Raises:
        UserError: An unknown case or layout, or ranks on several machines.
    """
    cases, whos = parse_cases(case), [_layouts.who(name) for name in who.split(",")]
    cores, texts = shared_cores(comm), []
    for one in cases:
        rows = on_root_quietly(comm, lambda: list(_rows(one, whos, cores)))     # noqa: B023 - called at once
        for name, _, predicted, measured in rows:
            emit(f"{one.name} predicted", name, predicted, "MiB")
            emit(f"{one.name} measured", name, measured, "MiB")
            emit(f"{one.name} predicted / measured - 1", name, _off(predicted, measured), "%")
        texts.append(table(one, rows))
    return "\n\n".join(texts)


def predicted(case: Case, who: Who) -> int:
    """Bytes of the rank that needs most."""
    # With PyTorch, which only rank 0 needs.
    from mpilm.model.shape import Shape
    from mpilm.parallel import footprint

    shape = Shape(layers=case.layers, width=case.width, heads=case.heads, hidden=case.hidden,
                  vocab_size=case.vocab_size)
    return footprint.largest(_layouts.configuration(case, who.variants), shape, _layouts.size(who)).total


def _rows(case: Case, whos: Sequence[Who], cores: Sequence[int]) -> Iterator[Row]:
    nothing = CASES["tiny"]

    @cache
    def bare(ranks: int) -> int:
        """What `ranks` processes need each without a model."""
        alone = _layouts.who(f"dp{ranks}-ring")
        return _measured(nothing, alone, cores) - predicted(nothing, alone)

    for who in whos:
        ranks = _layouts.size(who)
        needed = _measured(case, who, cores) - bare(ranks)
        yield who.name, ranks, predicted(case, who) / MIB, needed / MIB


def _measured(case: Case, who: Who, cores: Sequence[int]) -> int:
    progress(f"{case.name}: {who.name}")
    with pinned(cores), Job(who, case, cores=cores, size=_layouts.size(who)) as job:
        job.run(WARMUP_STEPS)
        return job.peak_memory(STEPS, of=_memory.own)


def table(case: Case, rows: Sequence[Row]) -> str:
    """A line a layout."""
    lines = [f"{case.name:<20} ranks   predicted MiB   measured MiB   difference"]
    for name, ranks, predicted, measured in rows:
        lines.append(f"{name:<20} {ranks:>5}   {predicted:>13,.0f}   {measured:>12,.0f}   "
                     f"{_off(predicted, measured):>+9.1f}%")
    return "\n".join(lines)


def _off(predicted: float, measured: float) -> float:
    return 100 * (predicted / measured - 1)
