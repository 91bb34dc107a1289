"""The Slurm scripts of jobs/ under a real Slurm of two emulated nodes: they train, save, come back, and end well."""

from __future__ import annotations

import time

import pytest

from tests.chaos.jobs import weights
from tests.slurm.submitted import settings, steps

pytestmark = [pytest.mark.serial, pytest.mark.slow]
# The time is up when less than this is left of the minutes that a job has: at once, which is after its second step.
# Slurm's own signal, a minute before the end, comes later than that.
OUT_OF_TIME = {"run.stop_before_s": 1000}


def test_one_node(submit, site, undisturbed, tmp_path):
    """Where it is the custom that a job takes nothing else over from the shell, and srun nothing from the job."""
    job = submit("train_one_node", f"--export={','.join(settings(site, tmp_path))}")
    assert job.ends() == ("COMPLETED", 0), job.words
    assert weights(tmp_path / "run") == undisturbed


def test_two_nodes(submit, undisturbed, tmp_path):
    job = submit("train_many_nodes", "--nodes=2", "--ntasks-per-node=1")
    assert job.ends() == ("COMPLETED", 0), job.words
    hosts = [line.split()[1] for line in job.words.splitlines() if line.startswith(("0 ", "1 "))]
    assert hosts == ["n1", "n2"], job.words
    assert weights(tmp_path / "run") == undisturbed


def test_a_job_that_is_out_of_time_comes_back_and_finishes(submit, undisturbed, tmp_path):
    job = submit("train_requeue", "--nodes=1", "--ntasks-per-node=1", **OUT_OF_TIME)
    assert job.ends() == ("COMPLETED", 0), job.words
    assert job["Restarts"] == "1", job.words
    for words in (f"start 1 of job {job.id}", "stopped because the time is up", "code 75", f"start 2 of job {job.id}"):
        assert words in job.words
    assert weights(tmp_path / "run") == undisturbed


def test_a_job_that_is_given_more_time_goes_on(submit, site, undisturbed, tmp_path):
    """What the environment says is from the beginning, in versions of Slurm that say it there."""
    if site != "openmpi":
        pytest.skip("srun has an environment of its own, and jobs/sites no mpirun of MPICH's")
    said = f"--export=ALL,SLURM_JOB_END_TIME={int(time.time()) + 300}"
    job = submit("train_requeue", "--nodes=1", "--ntasks-per-node=1", said, site="openmpi_mpirun", **OUT_OF_TIME)
    job.until(lambda: job["JobState"] == "RUNNING")
    job.cluster.ask("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    assert job.ends() == ("COMPLETED", 0), job.words
    assert "The end of the allocation has been put off: " in job.words
    assert job["Restarts"] == "0", job.words
    assert weights(tmp_path / "run") == undisturbed


def test_a_node_goes_down(submit, slurm, tmp_path):
    """And comes back with what Slurm had there, a socket of the first start among it, by which it fails once more."""
    job = submit("train_many_nodes", "--nodes=2", "--ntasks-per-node=1", **{"run.steps": 150, "checkpoint.every": 20})
    job.until(lambda: steps(tmp_path / "run") > 50)
    slurm.lose_node("n2")
    job.until(lambda: job["Restarts"] == "1")
    slurm.start_node("n2")
    job.until(lambda: "resumed from" in job.words)      # before, Slurm may say that it has ended
    assert job.ends() == ("COMPLETED", 0), job.words
    assert weights(tmp_path / "run").startswith("150 ")


def test_what_fails_stays_away(submit):
    job = submit("train_requeue", "--nodes=1", **{"run.stop_signals": "NONE"})
    assert job.ends() == ("FAILED", 2), job.words
    assert job["Restarts"] == "0"
    assert "NONE is no signal" in job.words


def test_what_is_cancelled_is_saved_and_stays_away(submit, tmp_path):
    job = submit("train_requeue", "--nodes=1", **{"run.steps": 100000})
    job.until(lambda: steps(tmp_path / "run") > 5)
    job.cancel()
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), job.words
    job.until(lambda: "Exited with exit code 75" in job.words)
    assert "a rank got SIGTERM; saved" in job.words
    assert int(weights(tmp_path / "run").split()[0]) > 5


def test_what_gives_way_to_another_is_saved_and_waits_for_its_turn(submit, slurm, tmp_path):
    job = submit("train_requeue", "--nodes=2", "--ntasks-per-node=1", **{"run.steps": 100000})
    job.until(lambda: steps(tmp_path / "run") > 5)
    slurm.ask("srun", "--partition=urgent", "--nodes=2", "--immediate=90", "true")
    job.until(lambda: job["JobState"] == "PENDING")
    assert job["Restarts"] == "1"
    assert "a rank got SIGUSR1; saved" in job.words
    assert int(weights(tmp_path / "run").split()[0]) > 5


def test_an_array_is_a_chain(submit, undisturbed, tmp_path):
    job = submit("train_array", "--nodes=1", "--ntasks-per-node=1", "--array=1-3%1", **OUT_OF_TIME)
    assert [job.element(number).ends() for number in (1, 2, 3)] == [("FAILED", 75), ("COMPLETED", 0), ("COMPLETED", 0)]
    assert weights(tmp_path / "run") == undisturbed


def test_a_parameter_server_on_each_node(submit, undisturbed, tmp_path):
    job = submit("parameter_server", "--nodes=2", "--ntasks=3")
    assert job.ends() == ("COMPLETED", 0), job.words
    assert weights(tmp_path / "run") == undisturbed
