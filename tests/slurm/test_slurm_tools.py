"""Under a real Slurm: data is prepared, nodes are measured, and mpirun inside an allocation survives a killed rank."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import textwrap
from pathlib import Path

import pytest

from tests import helpers
from tests.chaos.jobs import weights
from tests.slurm.submitted import steps

pytestmark = [pytest.mark.serial, pytest.mark.slow]


def test_data_is_prepared(submit_script, site, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for module in (inspect, textwrap, contextlib):
        (texts / f"{module.__name__}.py").write_text(inspect.getsource(module))
    job = submit_script("prepare_data", str(texts), str(tmp_path / "tokens"), "300", site=site)
    assert job.ends() == ("COMPLETED", 0), job.words
    assert (tmp_path / "tokens.tokenizer.json").exists()
    assert (tmp_path / "tokens" / "index.json").exists()


def test_nodes_are_measured(submit_script, site):
    job = submit_script("benchmark", "compress", "--mib", "1", "--json", site=site)
    assert job.ends() == ("COMPLETED", 0), job.words
    assert '"bench": "compress"' in job.words


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_a_rank_is_killed(submit, site, tmp_path, launcher):
    """The others go on without it; or the job ends, and is started again in the same allocation."""
    if launcher == "mpirun" and site != "openmpi":
        pytest.skip("ULFM is Open MPI's")
    job = submit("train_one_node", site="openmpi_mpirun" if launcher == "mpirun" else site,
                 **{"run.steps": 100, "checkpoint.every": 5})
    job.until(lambda: steps(tmp_path / "run") > 15)
    os.kill(rank(1, job), signal.SIGKILL)
    assert job.ends() == ("COMPLETED", 0), job.words
    assert ("went on after" if launcher == "mpirun" else "it is started again") in job.words
    assert weights(tmp_path / "run").startswith("100 ")


def test_mpirun_passes_signals_on_and_is_not_believed_when_nobody_is_left(submit, site, tmp_path):
    """Its daemons do not die of Slurm's signal; and it would say 0."""
    if site != "openmpi":
        pytest.skip("ULFM is Open MPI's")
    job = submit("train_requeue", "--nodes=2", "--ntasks-per-node=1", site="openmpi_mpirun",
                 **{"run.steps": 100000, "checkpoint.every": 100000})
    job.until(lambda: steps(tmp_path / "run") > 5)
    job.cluster.ask("scancel", "--signal=USR1", job.id)
    job.until(lambda: job["Restarts"] == "1" and f"start 2 of job {job.id}" in job.words)
    assert "a rank got SIGUSR1; saved" in job.words
    before = steps(tmp_path / "run")
    job.until(lambda: steps(tmp_path / "run") > before)
    for victim in (rank(1, job), rank(0, job)):
        os.kill(victim, signal.SIGKILL)
    assert job.ends() == ("FAILED", 1), job.words
    assert "no rank came to the end" in job.words
    assert not list(helpers.REPOSITORY.glob(f".marks-{job.id}-*"))


def rank(number, job):
    """Process id of a rank of this job; another cluster may have one of the same number."""
    for pid in job.cluster.processes():
        with contextlib.suppress(OSError):
            program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found = dict(word.split(b"=", 1) for word in words if b"=" in word)
            its = found.get(b"OMPI_COMM_WORLD_RANK", found.get(b"SLURM_PROCID"))    # mpirun's, or srun's
            if b"python" in program[0] and b"mpilm.train" in program and found[b"SLURM_JOB_ID"] == job.id.encode() \
                    and its == str(number).encode():
                return pid
    raise AssertionError(f"no rank {number}")
