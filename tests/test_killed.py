"""SIGKILL of the whole job at any moment: the next start goes on, loses little, and ends the same."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests import datasets, small_jobs
from tests.chaos import jobs
from tests.chaos.jobs import Job, losses, weights

EVERY = 3
OPTIONS = {"run.steps": 60, "log.validate_every": 0, "checkpoint.every": EVERY, "sync.collective": "shared"}


def killed_after(data, directory, pause_s):
    """Two ranks go on; every process is killed a moment after five more steps. The steps that are done then."""
    with Job(2, data, directory, **OPTIONS) as job:
        job.until_step(job.steps + 5)
        time.sleep(pause_s)
        done = job.steps
        job.kill_all()
    return done


@pytest.mark.serial
@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_undisturbed(tmp_path):
    """At random moments, checkpoints under way among them; one rank then ends with the bits that it has if it does all
    of it."""
    draw = random.Random(7)
    data, killed, whole = datasets.small(tmp_path / "data"), tmp_path / "killed", tmp_path / "whole"
    for _ in range(3):
        done = killed_after(data, killed, draw.uniform(0, 0.15))
        saved = (killed / "checkpoints").glob("step-*")
        newest = max((int(path.name.removeprefix("step-")) for path in saved), default=0)
        # One interval for what was not saved, one for the checkpoint that was being written.
        assert done - newest <= 2 * EVERY
    for directory in (killed, whole):
        small_jobs.train_here(data, directory, **jobs.OPTIONS | OPTIONS)
    assert (weights(killed), losses(killed)) == (weights(whole), losses(whole))
    assert not list(Path("/dev/shm").glob("*mpilm*"))
