"""A file system that refuses, at any call that writes: the reason is told, and what was saved stays good."""

from __future__ import annotations

import os
import random
import shutil

import pytest

from tests import datasets, small_jobs
from tests.chaos import storage

pytestmark = pytest.mark.serial
TRIALS = 1


@pytest.mark.skipif(not any(map(shutil.which, ("gcc", "cc", "g++", "clang"))), reason="needs a C compiler")
def test_a_write_is_refused(tmp_path):
    data = datasets.small(tmp_path / "data")
    trials = list(storage.refused(TRIALS, random.Random(3), data, tmp_path))
    assert [trial for trial in trials if trial.problem] == []


def test_files_of_a_run_have_the_rights_that_the_user_wants(run_mpi, tmp_path):
    directory, before = tmp_path / "run", os.umask(0o027)
    try:
        result = run_mpi(2, ["-m", "mpilm.train", *small_jobs.arguments(datasets.small(tmp_path / "data"), directory)])
    finally:
        os.umask(before)
    assert result.rc == 0, result.stderr
    paths = list(directory.rglob("*"))
    assert len(paths) > 5
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_dir()} == {"0o750"}
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_file()} == {"0o640"}
