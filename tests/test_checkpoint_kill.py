"""SIGKILL of the whole job while checkpoints are written: the newest is complete, never older than one interval."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest

from mpilm.checkpoint import Alone, newest
from tests import helpers
from tests.checkpoint_job import EVERY, SIZE

RANKS, TRIALS = 2, 16


def progress(directory):
    path = directory / "progress"
    return int(path.read_text() or 0) if path.exists() else 0


def start_and_kill(directory, moment):
    """Run the job, kill all of it `moment` seconds after it has saved for the first time; the last step saved."""
    for old in directory.glob("pid-*"):
        old.unlink()
    before = progress(directory)
    litter = {"TMPDIR": str(directory), "OMPI_MCA_btl_sm_backing_directory": str(directory)}
    job = helpers.start(RANKS, ["-m", "tests.checkpoint_job", str(directory)], env=litter,
                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while progress(directory) == before:
        assert job.poll() is None and time.monotonic() < deadline, job.stderr.read()
        time.sleep(0.001)
    time.sleep(moment)
    helpers.kill([int(path.read_text()) for path in directory.glob("pid-*")])
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    return progress(directory)


@pytest.mark.serial
def test_the_newest_is_complete_whenever_the_job_is_killed(tmp_path):
    draw = random.Random(0)
    complaints, leftovers = [], 0
    for _ in range(TRIALS):
        saved = start_and_kill(tmp_path, draw.uniform(0, 0.2))
        reader = newest(tmp_path / "checkpoints", Alone(), tell=complaints.append)
        leftovers += any(path.name.startswith(".") for path in (tmp_path / "checkpoints").iterdir())
        assert saved - EVERY <= reader.step <= saved + EVERY
        assert np.array_equal(reader.read("model.w", 0, RANKS * SIZE), np.full(RANKS * SIZE, reader.step, np.float32))
    assert complaints == []
    assert leftovers, "no kill came while something was being written"
