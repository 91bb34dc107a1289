"""A run directory belongs to one job, also while a job that has lost its first rank arranges itself anew."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time

import pytest

from mpilm import lock
from mpilm.lock import Claim, Lock
from mpilm.log import UserError

pytestmark = pytest.mark.serial


@pytest.fixture
def claim(tmp_path):
    """Makes claims to one folder, as processes of their own would have them."""
    claims = []

    def made(*, wait_s=0.0):
        claims.append(Claim(tmp_path / "run", wait_s=wait_s, otherwise="wait"))
        return claims[-1]

    (tmp_path / "run").mkdir()
    yield made
    for one in claims:
        one.release()


def job(claim, ranks):
    """The claims of the ranks of a job; the first leads."""
    job = [claim() for _ in range(ranks)]
    job[0].lead(alone=True)
    for one in job:
        one.follow()
    return job


def test_the_job_that_lost_its_first_rank_goes_on_and_not_the_one_that_waits(claim):
    first = job(claim, 3)
    with pytest.raises(UserError, match=f"another process is writing there \\(process {os.getpid()} on"):
        claim().lead(alone=True)
    came_in = []

    def wait():
        waiting = claim(wait_s=30)
        waiting.lead(alone=True)
        came_in.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    first[0].release()      # killed
    time.sleep(0.5)
    first[1].lead(alone=not any(one.follows for one in first[1:]))
    first[2].follow()
    time.sleep(0.3)
    assert not came_in
    first[1].release()
    time.sleep(0.3)
    assert not came_in, "one of its ranks lives, and may still write"
    first[2].release()
    thread.join()
    assert came_in


def test_one_at_a_time_and_again(claim):
    job(claim, 1)[0].release()
    again = job(claim, 2)
    again[0].lead(alone=False)
    again[1].follow()
    with pytest.raises(UserError, match="another process"):
        claim().lead(alone=True)


def make_again(tmp_path):
    """The folder, by somebody who has removed it."""
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()


def test_a_folder_that_was_removed_and_made_again_is_locked_anew(claim, tmp_path):
    mine = job(claim, 2)
    make_again(tmp_path)
    assert not any(one.follows for one in mine)
    mine[0].lead(alone=True)
    mine[1].follow()
    with pytest.raises(UserError, match="another process"):
        claim().lead(alone=True)


def test_a_folder_that_another_job_has_made_again(claim, tmp_path):
    mine = job(claim, 1)
    make_again(tmp_path)
    job(claim, 1)
    with pytest.raises(UserError, match="another process"):
        mine[0].lead(alone=not mine[0].follows)


def test_where_there_are_no_locks_it_is_said_once(claim, capfd, monkeypatch):
    def refuse(descriptor, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    job(claim, 2)
    job(claim, 2)
    assert capfd.readouterr().err.count("this file system has no locks (No locks available)") == 1


def test_a_lock_that_cannot_be_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        Lock(tmp_path / "nowhere" / ".lock").take()
