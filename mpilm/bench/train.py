"""Training steps: ours and PyTorch's own ways to train the same model on the same batch, on the same cores.

    mpirun -np 2 python -m mpilm.bench train                                    # both cases, everyone: half an hour
    mpirun -np 2 python -m mpilm.bench train --case wide --who mpilm,ddp,single --rounds 3

Every contender is a program of its own, started once and warmed up, which then waits for its turns (see _jobs.py and
_rounds.py). "ddp" and "fsdp2" are a process a rank with the rank's cores, "single" is one process with all of them;
"-compile" is torch.compile, "-tuned" the malloc settings that ours starts under; "mpilm-reproducible" has the bits of
any number of ranks, which takes smaller micro-batches, and "mpilm-slots" has these without the bits. All compute in the
same precision: `--precision`, or the faster one here, as a run would take it. Values are
tokens/s over all ranks, medians over the rounds. Cases "... peak PSS" and "... peak RSS" are MiB of the largest
process: its share of what processes map together, in steps after warming up; and all that it ever mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

from mpi4py import MPI

from mpilm.bench import _contenders
from mpilm.bench._contenders import Case, Precision, Who
from mpilm.bench._contest import MIB, Emit, emit_memory, emit_speed, measure, on_root_quietly, parse_cases, shared_cores
from mpilm.bench._rounds import Plan, Results, reference

OURS = tuple(name for name in _contenders.names() if _contenders.parse(name).ours)


def run(comm: MPI.Comm, emit: Emit, *, case: str, who: str, rounds: int, steps: int,
        precision: Precision | Literal["auto"]) -> str:
    """Measure, as `contest` does; returns a table with ratios to ddp and to the best peer. Collective over `comm`.

    Args:
        precision: Of all contenders: bf16, fp32, or auto, as `run.precision` of a run.
    """
    cases, whos = parse_cases(case), [_contenders.parse(name) for name in who.split(",")]
    plan, cores = Plan(rounds=rounds, steps=steps), shared_cores(comm)
    chosen = on_root_quietly(comm, _faster) if precision == "auto" else precision
    return "\n\n".join(_one_case(comm, emit, replace(one, precision=chosen), whos, plan, cores) for one in cases)


def _faster() -> Precision:
    """What a run would take here. Whoever takes part is told, so that nobody wins by another arithmetic."""
    from mpilm.model import precision

    return cast(Precision, precision.best(precision.measure(precision.DTYPES)))


def _one_case(
    comm: MPI.Comm, emit: Emit, case: Case, whos: Sequence[Who], plan: Plan, cores: tuple[int, ...]
) -> str:
    results = measure(comm, case, whos, cores, plan)
    emit_speed(emit, case, results)
    emit_memory(emit, case, results)
    return table(case, results, plan, size=comm.size, threads=max(1, len(cores) // comm.size))


def table(case: Case, results: Results, plan: Plan, *, size: int, threads: int) -> str:
    """One row a contender: tokens/s, ratios with their spread over the rounds, memory."""
    names = results.names()
    if not names:
        return f"{case.name}: nobody could be measured"
    base = reference(names)
    peers = [name for name in names if name not in OURS] or names
    best = max(peers, key=lambda name: results.ratio(name, base, by=base))
    head = (f"{case.name}: {case.layers} layers, width {case.width}, {case.global_batch_size} x {case.sequence_length} "
            f"tokens a step, {case.precision}; {size} ranks x {threads} threads; medians of {plan.rounds} rounds of "
            f"{plan.steps} steps, {results.num_groups} groups; best peer: {best}")
    rows = [["", "tokens/s", f"/{base}", "least - most", "/best peer", "peak PSS", "peak RSS MiB"]]
    for name in names:
        seen = results.ratios(name, base)
        rows.append([name, f"{results.median(name):,.0f}", f"{results.ratio(name, base, by=base):.2f}",
                     f"{min(seen):.2f} - {max(seen):.2f}", f"{results.ratio(name, best, by=base):.2f}",
                     f"{results.peak_pss[name] / MIB:,.0f}", f"{results.max_rss[name] / MIB:,.0f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([head, *lines])
