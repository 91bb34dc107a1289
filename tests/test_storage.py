"""A file system that refuses, at any call that writes: the reason is told, and what was saved stays good."""

from __future__ import annotations

import os
import random
import shutil

import pytest

from tests import datasets, small_jobs
from tests.chaos import storage

TRIALS = 1


@pytest.mark.serial
@pytest.mark.skipif(not any(map(shutil.which, ("gcc", "cc", "g++", "clang"))), reason="needs a C compiler")
def test_a_write_is_refused(tmp_path):
    data = datasets.small(tmp_path / "data")
    trials = list(storage.refused(TRIALS, random.Random(3), data, tmp_path))
    assert [trial for trial in trials if trial.problem] == []


@pytest.mark.ranks(min=2, max=2)
def test_files_of_a_run_have_the_rights_that_the_user_wants(comm, tmp_path_all):
    data, directory, before = datasets.for_all(comm, tmp_path_all / "data"), tmp_path_all / "run", os.umask(0o027)
    try:
        small_jobs.train_here(data, directory)
    finally:
        os.umask(before)
    paths = list(directory.rglob("*"))
    assert len(paths) > 5
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_dir()} == {"0o750"}
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_file()} == {"0o640"}
