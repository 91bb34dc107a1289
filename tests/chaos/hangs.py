"""A random rank is stopped (SIGSTOP): it is named within the time, and the job ends."""

from __future__ import annotations

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
