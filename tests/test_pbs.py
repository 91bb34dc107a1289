"""The PBS scripts of jobs/, run by bash with the variables that PBS sets. No PBS can be installed here: the test is the
queue, and the `qsub` that a script calls puts a line into a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mpi4py import MPI

from tests import datasets, small_jobs
from tests.chaos.jobs import weights
from tests.helpers import REPOSITORY, clean_environment, run_nested
from tests.slurm.submitted import settings

pytestmark = [pytest.mark.serial, pytest.mark.slow]
OUT_OF_TIME = {"run.time_limit_s": 1, "run.stop_before_s": 100}
MOST_JOBS = 5


@pytest.fixture
def queue(tmp_path):
    """Run a script on two ranks, and what it submits; exit codes."""
    (tmp_path / "bin").mkdir()
    qsub, submitted, nodes = tmp_path / "bin" / "qsub", tmp_path / "submitted", tmp_path / "nodes"
    qsub.write_text(f'#!/bin/sh\necho "$@" >> {submitted}\n')
    qsub.chmod(0o755)
    nodes.write_text("localhost\nlocalhost\n")

    def running(script, arguments):
        environment = clean_environment() | settings("openmpi" if MPI.get_vendor()[0] == "Open MPI" else "mpich") | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PBS_NODEFILE": str(nodes),
            "PBS_O_WORKDIR": str(REPOSITORY), "MPILM_ARGS": " ".join(arguments)}
        waiting, codes = [f"-V jobs/{script}"], []
        while waiting and len(codes) < MOST_JOBS:
            ended = subprocess.run(["bash", waiting.pop().split()[-1]], cwd=REPOSITORY, env=environment, timeout=120,
                                   stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            codes.append(ended.returncode)
            waiting = submitted.read_text().splitlines()[len(codes) - 1:] if submitted.exists() else []
            sys.stdout.write(ended.stdout + ended.stderr)
        return codes

    return running


def arguments(directory: Path, **changes):
    """Of a run of three steps."""
    data = datasets.small(directory / "data")
    return small_jobs.arguments(data, directory / "run", **{"run.steps": 3} | changes)


def undisturbed(directory: Path):
    """Weights of the same run, started without PBS."""
    options = small_jobs.arguments(directory / "data", directory / "undisturbed", **{"run.steps": 3})
    assert run_nested(0, ["-m", "mpilm.train", *options]).rc == 0
    return weights(directory / "undisturbed")


def test_a_job_that_is_out_of_time_submits_another(queue, tmp_path):
    assert queue("train_resubmit.pbs", arguments(tmp_path, **OUT_OF_TIME)) == [75, 0]
    assert weights(tmp_path / "run") == undisturbed(tmp_path)


def test_what_fails_stays_away(queue, tmp_path):
    assert queue("train_resubmit.pbs", arguments(tmp_path, **{"run.stop_signals": "NONE"})) == [2]


def test_a_finished_run_does_nothing(queue, tmp_path):
    for _ in range(2):
        assert queue("train_array.pbs", arguments(tmp_path)) == [0]
