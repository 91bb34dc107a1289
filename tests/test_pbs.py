"""The PBS scripts of jobs/, run by bash with the variables that PBS sets. No PBS can be installed here: the test is the
queue, and the `qsub` that a script calls puts a line into a file."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mpi4py import MPI

from tests import datasets, small_jobs
from tests.chaos.jobs import weights
from tests.helpers import REPOSITORY, clean_environment
from tests.slurm.submitted import settings

pytestmark = [pytest.mark.serial, pytest.mark.slow]
OUT_OF_TIME = {"run.time_limit_s": 1, "run.stop_before_s": 0.99}
MOST_JOBS = 5
# What `qstat -f` of PBS says of a job; lines are broken anywhere.
QSTAT = """Job Id: 7.pbs
    Job_Name = mpilm
    queue = exec_queue
    Variable_List = PBS_O_HOME=/home/user,MPILM_ARGS=--config a.toml,
\tPBS_O_QUEUE=route
    Submit_arguments = -A physics -q route -l select=2:ncpus=2:mpiprocs=2 -l wallt
\time=01:00:00 -V jobs/train_resubmit.pbs
    project = _pbs_project_default

"""
OPTIONS = "-A physics -q route -l select=2:ncpus=2:mpiprocs=2 -l walltime=01:00:00"


@pytest.fixture
def queue(tmp_path):
    """Run a script on two ranks, and what it submits; exit codes."""
    (tmp_path / "bin").mkdir()
    qsub, submitted, nodes = tmp_path / "bin" / "qsub", tmp_path / "submitted", tmp_path / "nodes"
    qsub.write_text(f'#!/bin/sh\necho "$@" >> {submitted}\n')
    qsub.chmod(0o755)
    (tmp_path / "bin" / "qstat").write_text(f"#!/bin/sh\ncat <<'EOF'\n{QSTAT}EOF\n")
    (tmp_path / "bin" / "qstat").chmod(0o755)
    nodes.write_text("localhost\nlocalhost\n")

    def running(script, arguments, **variables):
        site = "openmpi" if MPI.get_vendor()[0] == "Open MPI" else "mpich"
        environment = clean_environment() | settings(site, tmp_path) | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PBS_NODEFILE": str(nodes),
            "PBS_O_WORKDIR": str(REPOSITORY), "MPILM_ARGS": " ".join(arguments)} | variables
        submitted.unlink(missing_ok=True)
        waiting, codes = [f"-V jobs/{script}"], []
        while waiting and len(codes) < MOST_JOBS:
            ended = subprocess.run(["bash", waiting.pop().split()[-1]], cwd=REPOSITORY, env=environment, timeout=120,
                                   stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            codes.append(ended.returncode)
            waiting = submitted.read_text().splitlines()[len(codes) - 1:] if submitted.exists() else []
            sys.stdout.write(ended.stdout + ended.stderr)
        return codes

    return running


def arguments(data: Path, directory: Path, **changes):
    """Of a run of three steps."""
    return small_jobs.arguments(data, directory, **{"run.steps": 3} | changes)


def test_a_job_that_is_out_of_time_submits_another(queue, tmp_path, capsys):
    data = datasets.small(tmp_path / "data")
    assert queue("train_resubmit.pbs", arguments(data, tmp_path / "run", **OUT_OF_TIME)) == [75, 0]
    assert (tmp_path / "submitted").read_text() == f"{OPTIONS} -V jobs/train_resubmit.pbs\n", capsys.readouterr().out
    small_jobs.train_here(data, tmp_path / "undisturbed", **{"run.steps": 3})
    assert weights(tmp_path / "run") == weights(tmp_path / "undisturbed")


@pytest.mark.parametrize("script", ["train_resubmit", "train_array", "train_one_node"])
def test_what_fails_stays_away(queue, tmp_path, capsys, script):
    options = arguments(tmp_path / "data", tmp_path / "run", **{"run.stop_signals": "NONE"})
    assert queue(f"{script}.pbs", options) == [2]
    assert "NONE is no signal" in capsys.readouterr().out


def test_data_is_prepared_and_a_server_trains(queue, tmp_path, capsys):
    (tmp_path / "text.py").write_text(inspect.getsource(inspect))
    where = {"TEXT": str(tmp_path / "text.py"), "TO": f"{tmp_path / 'tokens'}/", "VOCABULARY": "300"}
    assert queue("prepare_data.pbs", [], **where) == [0]
    assert (tmp_path / "tokens.tokenizer.json").exists()
    assert queue("parameter_server.pbs", arguments(tmp_path / "tokens", tmp_path / "run")) == [0]
    assert "finished at step 3" in capsys.readouterr().out


def test_nodes_are_measured(queue, capsys):
    assert queue("benchmark.pbs", ["compress", "--mib", "1", "--json"]) == [0]
    assert '"bench": "compress"' in capsys.readouterr().out
