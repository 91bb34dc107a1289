"""A training that is started again after ranks have died: jobs/again.sh, under any MPI."""

from __future__ import annotations

import subprocess

import pytest

from tests import datasets, small_jobs
from tests.chaos import jobs
from tests.chaos.jobs import Job, losses, weights
from tests.helpers import REPOSITORY, clean_environment, mpirun

pytestmark = [pytest.mark.serial, pytest.mark.slow]
AGAIN = str(REPOSITORY / "jobs" / "again.sh")
# One start: the next line of a plan, which has the marks that are left, and the exit code.
START = """
echo >>starts
read -r code marks < <(sed -n "$(wc -l <starts)p" plan)
for mark in $marks; do [ "$mark" = told ] && kill -TERM "$PPID" || echo "$mark" >>"$MPILM_MARKS"; done
exit "$code"
"""


@pytest.mark.parametrize(("plan", "code"), [
    (["0 started saved ended"], 0),
    (["2 started"], 2),
    (["75 started saved"], 75),
    (["1 started"], 1),
    (["127"], 127),
    (["137 started saved", "1 started saved", "0 started ended"], 0),
    (["137 started saved", "77 started"], 75),
    (["9 started saved", "75 started saved"], 75),
    (["1", "137", "0 started ended"], 0),
    (["1", "1", "1"], 1),
    (["0", "0", "0"], 1),
    (["0", "0 started ended"], 0),
    (["0 started"], 1),
    (["0 started saved", "0", "0 started ended"], 0),
    (["137 started saved", "1", "1", "76 started saved", "1", "1", "0 started ended"], 0),
    (["137 started saved", "1", "1", "1"], 75),
    (["137 told started saved"], 137),
], ids=str)
def test_it_goes_on_as_long_as_it_gets_further(tmp_path, plan, code):
    (tmp_path / "plan").write_text("\n".join(plan))
    ended = subprocess.run([AGAIN, "bash", "-c", START], cwd=tmp_path, env=clean_environment() | {"MPILM_PAUSE_S": "0"},
                           timeout=60, check=False, capture_output=True, text=True)
    assert (ended.returncode, (tmp_path / "starts").read_text().count("\n")) == (code, len(plan)), ended.stderr
    assert ended.stderr.count("it is started again") == len(plan) - 1
    assert not list(tmp_path.glob(".marks-*"))


def test_a_rank_is_killed_where_that_ends_the_job(tmp_path):
    """The second start comes to the end of a run that nobody disturbed."""
    data, killed, whole = datasets.small(tmp_path / "data"), tmp_path / "killed", tmp_path / "whole"
    options = {"run.steps": 30, "log.validate_every": 0, "checkpoint.every": 5}
    with Job(2, data, killed, launcher=[AGAIN, mpirun()], **options) as job:
        assert job.until_step(15)
        assert job.kill(0)
        assert job.wait() == 0, job.words.read_text()
    assert job.words.read_text().count("it is started again") == 1
    small_jobs.train_here(data, whole, **jobs.OPTIONS | options)
    assert (weights(killed), losses(killed)) == (weights(whole), losses(whole))
