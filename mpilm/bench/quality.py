"""What every way to keep replicas together learns, and what it sends: real runs of the built-in corpus.

    mpirun -np 3 python -m mpilm.bench quality
    mpirun -np 4 python -m mpilm.bench quality --steps 1024 --who allreduce-int8,local_sgd,diloco

Every run sees the same tokens (`_replicas.py` says which runs there are). "loss" is the validation loss after the last
step in nats per token, "distance" how much more that is than allreduce's. "MiB a step" is what the rank sends that
sends most, on average once the warm-up is over; what a server sees in memory that it shares with a worker is not sent.
Tokens/s are from then on too, of runs one after the other, on a machine that may have drifted in between.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from mpi4py import MPI

from mpilm.bench import _replicas
from mpilm.bench._replicas import BASELINE, SMALL
from mpilm.comm.p2p import Traffic
from mpilm.config import Config
from mpilm.launch import session
from mpilm.server import Serving
from mpilm.train import built_in
from mpilm.trainer import Trainer

OURS: tuple[str, ...] = ()
MIB = 2**20
Emit = Callable[[str, str, float, str], None]


@dataclass(frozen=True)
class Outcome:
    """Of a run: nats per token, MiB that the busiest rank sent a step, tokens/s."""

    loss: float
    sent_mib: float
    speed: float


def run(comm: MPI.Comm, emit: Emit, *, who: str, steps: int) -> str:
    """Train. Collective over `comm`.

    Args:
        emit: Gets (case, who, value, unit).
        who: Names of runs, with commas between.
        steps: Of each run.

    Returns:
        The table.

    Raises:
        UserError: An unknown run, or one that so few ranks cannot do.
    """
    chosen, found = _replicas.chosen(who), {}
    with session() as world:
        data = built_in(world)
    for number, name in enumerate(chosen, 1):
        started = time.perf_counter()
        found[name] = outcome(_replicas.configuration(name, SMALL, data, steps=steps), comm)
        if comm.rank == 0:
            print(f"{number} of {len(chosen)}: {name}, {time.perf_counter() - started:.0f} s", file=sys.stderr)
        emit("loss", name, found[name].loss, "nats a token")
        emit("sent", name, found[name].sent_mib, "MiB a step")
        emit("speed", name, found[name].speed, "tokens/s")
    return table(found)


def outcome(config: Config, comm: MPI.Comm) -> Outcome:
    """Train one of them to its end. Collective over `comm`."""
    warmup, steps = config.sync.compress_warmup, config.run.steps
    with _replicas.training(config, comm) as program:
        advance(program, warmup)
        before, started = Traffic.sent, time.perf_counter()
        advance(program, steps)
        sent = comm.allreduce(Traffic.sent - before, op=MPI.MAX)
        seconds = comm.allreduce(time.perf_counter() - started, op=MPI.MAX)
        loss = comm.allreduce(finish(program), op=MPI.MAX)      # of all that train the same
    done = steps - warmup
    return Outcome(loss, sent / done / MIB, _replicas.tokens(config) * done / seconds)


def advance(program: Trainer | Serving, to: int) -> None:
    """Train, or serve those who do, until everyone has done `to` steps."""
    while program.state.step < to:
        program.step()


def finish(program: Trainer | Serving) -> float:
    """The validation loss, of ranks that train; collective over them."""
    if isinstance(program, Serving):
        program.server.finish()
        program.saver.wait()
        return -math.inf
    assert program.validation is not None, "it is configured"
    return program.validation.loss()


def table(found: dict[str, Outcome]) -> str:
    """As the README has it."""
    best = found[BASELINE].loss
    lines = ["| | loss | distance | MiB a step | tokens/s |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {one.loss:.3f} | {one.loss - best:+.3f} | {one.sent_mib:.3f} | "
                                f"{one.speed:,.0f} |" for name, one in found.items())])
