"""A job that does nothing but save, killed again and again: its newest checkpoint is complete, and not old."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mpilm.checkpoint import Alone, newest
from tests import helpers
from tests.chaos.kills import Trial
from tests.checkpoint_job import EVERY, SIZE

RANKS = 2


def killed(trials: int, draw: random.Random, data: Path, folder: Path) -> Iterator[Trial]:
    """The whole job, a moment after it has begun to save."""
    directory = folder / "saves"
    directory.mkdir(parents=True)
    for _ in range(trials):
        moment = draw.uniform(0, 0.2)
        saved = start_and_kill(directory, moment)
        left = sum(path.name.startswith(".") for path in (directory / "checkpoints").iterdir())
        yield Trial(f"step {saved} was saved last, {left} unfinished", problem(directory, saved))


def start_and_kill(directory: Path, moment: float) -> int:
    """Run the job, kill all of it `moment` seconds after it has saved for the first time; the last step saved."""
    for old in directory.glob("pid-*"):
        old.unlink()
    before = _progress(directory)
    litter = {"TMPDIR": str(directory), "OMPI_MCA_btl_sm_backing_directory": str(directory)}
    job = helpers.start(RANKS, ["-m", "tests.checkpoint_job", str(directory)], env=litter,
                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while _progress(directory) == before:
        assert job.poll() is None and time.monotonic() < deadline, job.stderr and job.stderr.read()
        time.sleep(0.001)
    time.sleep(moment)
    helpers.kill([int(path.read_text()) for path in directory.glob("pid-*")])
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    return _progress(directory)


def problem(directory: Path, saved: int) -> str:
    """What is wrong with the newest checkpoint, when step `saved` was saved last."""
    complaints: list[str] = []
    reader = newest(directory / "checkpoints", Alone(), tell=complaints.append)
    if reader is None or complaints:
        return f"damaged: {complaints}"
    if not saved - EVERY <= reader.step <= saved + EVERY:
        return f"the newest is step {reader.step}"
    whole = np.array_equal(reader.read("model.w", 0, RANKS * SIZE), np.full(RANKS * SIZE, reader.step, np.float32))
    return "" if whole else "other values than were saved"


def _progress(directory: Path) -> int:
    path = directory / "progress"
    return int(path.read_text() or 0) if path.exists() else 0
