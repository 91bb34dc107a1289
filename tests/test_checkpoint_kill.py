"""SIGKILL of the whole job while checkpoints are written: the newest is complete, never older than one interval."""

from __future__ import annotations

import random

import pytest

from tests.chaos import saves

TRIALS = 12


@pytest.mark.serial
def test_the_newest_is_complete_whenever_the_job_is_killed(tmp_path):
    trials = list(saves.killed(TRIALS, random.Random(0), tmp_path, tmp_path / "job"))
    assert [trial for trial in trials if trial.problem] == []
    assert any("0 unfinished" not in trial.case for trial in trials), "no kill came while something was being written"
