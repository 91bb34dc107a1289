"""Ranks killed at random moments: the run ends with the weights and losses of one that nobody disturbed."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.chaos.jobs import Curve, Job, losses, weights

ONE: dict[str, Any] = {}
TEAMS = {"parallel.tp": 2, "model.vocab_size": 258}
BF16 = {"run.precision": "bf16"}
LOCAL = {"sync.kind": "local_sgd", "sync.every": 4, "run.reproducible": "false"}
# name -> (ranks, options); every layout has replicas of everything, or must go back to a checkpoint
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp3": (3, {}),
    "dp4": (4, {"sync.collective": "shared"}),
    "dp2 x pp2": (4, {"parallel.pp": 2}),
    "pp2": (2, {"parallel.pp": 2}),
    "dp4, ring of nodes": (4, {"sync.collective": "tree"}),
    "dp2 and a spare": (3, {"run.spares": 1}),
    "sharded 1": (4, {"sync.kind": "sharded"}),
    "sharded 3": (4, {"sync.kind": "sharded", "sync.level": 3}),
    "dp2 x tp2": (4, TEAMS),
    "dp2 x cp2": (4, {"parallel.cp": 2}),
    "a server": (4, {"sync.kind": "parameter_server"}),
    "local sgd": (3, LOCAL),
    "dp2 in bf16": (2, BF16),
}
# Whose weights and losses it ends with, where that is not a run of one rank: these axes enter the bits. None: no such
# promise is made, only that it gets to the end; under cp that is so when replicas have become fewer.
TWINS: dict[str, tuple[int, dict[str, Any]] | None] = {
    "dp2 x tp2": (4, TEAMS), "dp2 x cp2": (4, {"parallel.cp": 2}), "local sgd": None, "dp2 in bf16": (1, BF16)}
FEWER = {"dp2 x cp2"}
STEPS = 40


@dataclass
class Trial:
    """One run that was hurt.

    Attributes:
        case: What was done, in words.
        problem: What is wrong with how it ended; empty if nothing is.
        seconds: From a death to the next step, if the run went on in the same job.
    """

    case: str
    problem: str
    seconds: float | None = None


def under_ulfm(trials: int, draw: random.Random, data: Path, folder: Path) -> Iterator[Trial]:
    """One kill of a rank, or two soon after each other, in one job."""
    for number in range(trials):
        name = list(LAYOUTS)[number % len(LAYOUTS)]
        ranks, options = LAYOUTS[name]
        kills = min(draw.choice([1, 1, 2]), ranks - 1)
        victims = draw.sample(range(ranks), kills)
        directory = folder / f"ulfm-{number}"
        with Job(ranks, data, directory, ulfm=True, **options) as job:
            there = job.until_step(draw.randint(1, STEPS - 2))
            for victim in victims:
                time.sleep(draw.uniform(0, 0.3) if draw.random() < 0.5 else draw.uniform(0, 0.02))
                job.kill(victim)
            code = job.wait()
        said = job.words.read_text()
        problem = (_problem(directory, data, folder, name, compared=name not in FEWER) if code == 0
                   else f"exit code {code}")
        yield Trial(f"{name}, killed {victims}{'' if there else ' (too late)'}", problem and f"{problem}: {job.words}",
                    _pause(said))
        if not problem:
            shutil.rmtree(directory, ignore_errors=True)


def with_restarts(trials: int, draw: random.Random, data: Path, folder: Path) -> Iterator[Trial]:
    """A rank is killed, the launcher ends the job, and it is started again."""
    for number in range(trials):
        name = list(LAYOUTS)[number % len(LAYOUTS)]
        ranks, options = LAYOUTS[name]
        directory, victim = folder / f"restart-{number}", draw.randrange(ranks)
        with Job(ranks, data, directory, **options) as job:
            job.until_step(draw.randint(1, STEPS - 2))
            time.sleep(draw.uniform(0, 0.05))
            job.kill(victim)
            first = job.wait()
        with Job(ranks, data, directory, **options) as job:
            code = job.wait()
        ended = code == 0 and first is not None
        problem = _problem(directory, data, folder, name) if ended else f"exit codes {first}, {code}"
        yield Trial(f"{name}, killed [{victim}]", problem and f"{problem}: {job.words}")
        if not problem:
            shutil.rmtree(directory, ignore_errors=True)


def _problem(directory: Path, data: Path, folder: Path, name: str, *, compared: bool = True) -> str:
    if not compared or TWINS.get(name, ()) is None:
        told = [line[0] for line in losses(directory)]
        return "" if told == list(range(1, STEPS + 1)) else f"metrics of steps {told}"
    wanted, curve = undisturbed(data, folder, name)
    if (found := weights(directory)) != wanted:
        return f"weights {found}, not {wanted}"
    if losses(directory) != curve:
        return f"metrics differ: {sorted(set(losses(directory)) ^ set(curve))}"
    return ""


def undisturbed(data: Path, folder: Path, name: str = "") -> tuple[str, Curve]:
    """Weights and curve that a layout ends with when nobody is killed."""
    ranks, options = TWINS.get(name) or (1, ONE)
    return _undisturbed(data, folder, ranks, tuple(options.items()))


@cache
def _undisturbed(data: Path, folder: Path, ranks: int, options: tuple[tuple[str, Any], ...]) -> tuple[str, Curve]:
    directory = folder / "-".join(["undisturbed", *(name for name, _ in options)])
    with Job(ranks, data, directory, **dict(options)) as job:
        assert job.wait() == 0, job.words.read_text()
    return weights(directory), losses(directory)


def _pause(said: str) -> float | None:
    found = re.search(r"went on after ([\d.]+) s", said)
    return float(found[1]) if found else None
