"""A slow network, emulated: what sends less is faster there, and how much of the loss that costs.

    mpirun -np 2 python -m mpilm.bench slow
    mpirun -np 2 python -m mpilm.bench slow --mbit_s 1000 --who allreduce-topk,local_sgd

Runs of the built-in corpus (`_replicas.py` says which) take turns: each trains some steps over a line of `--mbit_s` and
`--latency_ms` out of every rank (comm/network.py); those that average every 32 steps, so many at a turn. The first
turn, in which they get to know the line, does not count. Then each goes on to its last step, over the machine's own
memory, since what is learned does not depend on the line, and is validated. Values are medians over the turns.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack

from mpi4py import MPI

from mpilm.bench import _replicas
from mpilm.bench._replicas import BASELINE, EVERY, LARGE
from mpilm.bench.measure import timed
from mpilm.bench.quality import advance, finish
from mpilm.comm.network import Line, emulated
from mpilm.comm.p2p import Traffic
from mpilm.config import Config
from mpilm.launch import session
from mpilm.log import UserError
from mpilm.train import built_in
from mpilm.trainer import Trainer

OURS = tuple(name for name in _replicas.names() if name != BASELINE)
TURN = 2    # steps, of those that send at every one
SETTLE = 8  # and of their first turn: codes are sent in either way, until the quicker one is known
MIB = 2**20
Emit = Callable[[str, str, float, str], None]


def run(comm: MPI.Comm, emit: Emit, *, who: str, steps: int, rounds: int, mbit_s: int, latency_ms: int) -> None:
    """Measure. Collective over `comm`.

    Args:
        emit: Gets (case, who, value, unit).
        who: Names of runs, with commas between.
        steps: Of each run.
        rounds: Turns of each, over the slow line.
        mbit_s, latency_ms: What the line is like.

    Raises:
        UserError: An unknown run, or one with servers; too few steps for so many rounds.
    """
    chosen = _replicas.chosen(who)
    if served := [name for name in chosen if name.startswith("server")]:
        raise UserError(f"--who {served[0]}: servers are not compared here; see bench server and bench quality.")
    _require(steps, rounds)
    with session() as world:
        data = built_in(world)
    configs = {name: _replicas.configuration(name, LARGE, data, steps=steps) for name in chosen}
    with ExitStack() as stack:
        runs = {name: _trainer(stack, config, comm) for name, config in configs.items()}
        warm_up(runs, steps)
        with emulated(Line(mbit_s, latency_ms)):
            take_turns(comm, runs, configs, 1, steps=SETTLE)
            speeds, sent = take_turns(comm, runs, configs, rounds)
        for name, values in speeds.items():
            emit(f"{mbit_s} Mbit/s", name, statistics.median(values), "tokens/s")
        for name, value in sent.items():
            emit("sent", name, value, "MiB a step")
        for name, trainer in runs.items():
            _progress(comm, f"{name}: to step {steps}")
            advance(trainer, steps)
            emit(f"after {steps * _replicas.tokens(configs[name]):,} tokens", name, finish(trainer), "nats a token")


def _require(steps: int, rounds: int) -> None:
    least = (steps // 8 // EVERY + 2 + rounds) * EVERY
    if steps < least:
        raise UserError(f"--steps {steps}: {rounds} turns of {EVERY} steps after the warm-up and a turn that does not "
                        f"count take {least} at least.")


def _trainer(stack: ExitStack, config: Config, comm: MPI.Comm) -> Trainer:
    program = stack.enter_context(_replicas.training(config, comm))
    assert isinstance(program, Trainer), "it has servers"
    return program


def warm_up(runs: dict[str, Trainer], steps: int) -> None:
    """Go on to where everything is compressed, and to the end of a round of local steps."""
    for trainer in runs.values():
        advance(trainer, (steps // 8 // EVERY + 1) * EVERY)


def take_turns(comm: MPI.Comm, runs: dict[str, Trainer], configs: dict[str, Config], rounds: int, *,
               steps: int = TURN) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Tokens/s of every turn, and MiB that the busiest rank sent in a step. Collective over `comm`.

    Args:
        steps: Of a turn of those that send at every step.
    """
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    sent: dict[str, float] = {}
    names = list(runs)
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            repeats = EVERY if configs[name].sync.kind == "local_sgd" else steps
            before = Traffic.sent
            seconds = timed(comm, runs[name].step, repeats=repeats)
            speeds[name].append(_replicas.tokens(configs[name]) / seconds)
            sent[name] = comm.allreduce(Traffic.sent - before, op=MPI.MAX) / repeats / MIB
            _progress(comm, f"round {turn + 1} of {rounds}: {name} {speeds[name][-1]:,.0f} tokens/s")
    return speeds, sent


def _progress(comm: MPI.Comm, text: str) -> None:
    if comm.rank == 0:
        print(text, file=sys.stderr, flush=True)
