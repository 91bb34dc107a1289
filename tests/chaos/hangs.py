"""A random rank is stopped (SIGSTOP): it is named within the time, and the job ends. All are: it goes on when they do.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from mpilm import heartbeat
from tests.chaos.jobs import Job
from tests.chaos.kills import Trial

TIMEOUT_S = 4


def stopped(trials: int, draw: random.Random, data: Path, folder: Path) -> Iterator[Trial]:
    """At a random moment of training."""
    options = {"run.steps": 100000, "run.hang_timeout_s": TIMEOUT_S}
    for number in range(trials):
        directory, ranks = folder / f"hang-{number}", draw.choice([2, 3, 4])
        victim = draw.randrange(ranks)
        with Job(ranks, data, directory, **options) as job:
            job.until_step(draw.randint(1, 40))
            time.sleep(draw.uniform(0, 0.05))
            job.signal(victim, signal.SIGSTOP)
            begun = time.monotonic()
            named = job.until(lambda report=directory / heartbeat.FILE: report.exists())
            took, code = time.monotonic() - begun, job.wait()
        words = (directory / heartbeat.FILE).read_text() if named else ""
        problem = ("" if code == heartbeat.HUNG and f"rank {victim} does not answer" in words
                   else f"exit code {code}: {job.words}")
        if not problem and took > TIMEOUT_S:
            problem = f"named only after {took:.1f} s"
        yield Trial(f"rank {victim} of {ranks} stopped", problem, took)
        if not problem:
            shutil.rmtree(directory)


def suspended(trials: int, draw: random.Random, data: Path, folder: Path) -> Iterator[Trial]:
    """All ranks, one after the other, as a scheduler does that needs their cores, for up to four times the time after
    which they would be missed; four times in a job."""
    options = {"run.steps": 100000, "run.hang_timeout_s": 1, "log.validate_every": 0, "checkpoint.every": 50}
    for number in range(trials):
        directory, ranks = folder / f"suspended-{number}", draw.choice([2, 3, 4])
        kinds = draw.choice([{}, {"sync.kind": "parameter_server"}, {"run.spares": 1}])
        with Job(ranks, data, directory, **options | kinds) as job:
            good = job.until_step(5)
            for _ in range(4):
                pids = list(job.ranks().values())
                _send(signal.SIGSTOP, pids, draw)
                time.sleep(draw.uniform(0.5, 4))
                _send(signal.SIGCONT, draw.sample(pids, len(pids)), draw)
                good = good and job.until_step(job.steps + 5)
        yield Trial(f"{ranks} ranks suspended, {kinds or 'replicas'}", "" if good else f"it ended: {job.words}")
        if good:
            shutil.rmtree(directory)


def _send(number: int, pids: list[int], draw: random.Random) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        time.sleep(draw.choice([0, 0.05]))
