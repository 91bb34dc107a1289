"""The test frame itself: one failing rank fails the test everywhere, is named, and hangs nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import REPOSITORY, Result, run_nested

pytestmark = pytest.mark.serial

HEAD = """
import pytest, time
from mpi4py import MPI
RANK = MPI.COMM_WORLD.rank
"""


def pytest_on(directory: Path, body: str, *, n: int = 2, options: tuple[str, ...] = (), grace_s: int = 60) -> Result:
    """pytest on `n` ranks over one file of tests, within our frame.

    Args:
        grace_s: Of a rank that failed, for the others to come; short only where they never will: a busy machine may
            keep them for seconds.
    """
    file = directory / "test_inner.py"
    file.write_text(HEAD + body)
    return run_nested(n, ["-m", "pytest", "-c", str(REPOSITORY / "setup.cfg"), "--rootdir", str(directory),
                          "-p", "tests.conftest", "--color=no", *options, str(file)],
                      env={"MPILM_TEST_GRACE_S": str(grace_s)}, cwd=directory, timeout=120)


CALM = """
from hypothesis import given, strategies as st

@pytest.fixture
def fragile():
    if RANK == 0:
        raise RuntimeError("no such thing")

def test_good(comm, tmp_path_all):
    assert comm.size == 2 and tmp_path_all.is_dir()
def test_one_fails(comm):
    assert RANK != 1, "only rank 1 sees this"
def test_setup_fails(fragile, comm, tmp_path_all):
    comm.Barrier()
def test_one_skips():
    if RANK == 1: pytest.skip("not here")
def test_next(comm):
    comm.Barrier()
@given(st.lists(st.integers()))
def test_same_examples(comm, numbers):
    assert comm.allgather(numbers) == [numbers] * comm.size
@pytest.mark.serial
def test_alone(): pass
@pytest.mark.ranks(min=3)
def test_three(): pass
@pytest.mark.ranks(min=2, max=2)
def test_two(): pass
"""


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A run whose failures leave nobody waiting."""
    return pytest_on(tmp_path_factory.mktemp("calm"), CALM)


def test_counts(calm):
    assert calm.rc == 1
    assert "2 failed, 4 passed, 2 deselected, 1 error" in calm.stdout, calm
    assert calm.stdout.count("test session starts") == 1


def test_failure_on_one_rank_is_named(calm):
    assert "[rank 1] failed" in calm.stdout
    assert "only rank 1 sees this" in calm.stdout


def test_setup_failure_on_one_rank_is_named(calm):
    assert "[rank 0] failed" in calm.stdout
    assert "no such thing" in calm.stdout


def test_skip_on_one_rank_is_a_failure(calm):
    assert "[rank 1] skipped" in calm.stdout


def test_failure_while_others_wait_in_a_collective(tmp_path):
    result = pytest_on(tmp_path, """
def test_stuck(comm):
    assert RANK != 1, "left the others alone"
    comm.Barrier()
""", grace_s=1)
    assert result.rc not in (0, None)
    assert "[rank 1]" in result.stderr
    assert "left the others alone" in result.stderr


def test_missing_test_ends_all(tmp_path):
    result = pytest_on(tmp_path, """
def test_a(): pass
if RANK == 0:
    def test_b(comm): comm.Barrier()
""")
    assert result.rc == 3
    assert "test_b" in result.stdout + result.stderr
    assert "ranks have different tests" in result.stdout + result.stderr


def test_import_error_on_one_rank_ends_all(tmp_path):
    result = pytest_on(tmp_path, "def test_a(comm): comm.Barrier()\nif RANK == 1: raise ImportError('broken here')\n")
    assert result.rc == 3
    assert "[rank 1] 1 errors in collection" in result.stdout + result.stderr


def test_watchdog_ends_what_nobody_fails(tmp_path):
    result = pytest_on(tmp_path, "def test_a(comm):\n    comm.recv(source=RANK)\n",
                       options=("-o", "faulthandler_timeout=1"))
    assert result.rc not in (0, None)
    assert "test_inner.py" in result.stderr


def test_watch_fixture_shows_stacks(tmp_path):
    result = pytest_on(tmp_path, "def test_a(comm, watch):\n    with watch(1):\n        comm.recv(source=RANK)\n")
    assert result.rc not in (0, None)
    assert "still at it after 1 s" in result.stderr
    assert "test_inner.py" in result.stderr


def test_own_ranks_do_not_leak_into_a_nested_run(run_mpi):
    result = run_mpi(2, ["-c", "from mpi4py import MPI; print(MPI.COMM_WORLD.size)"])
    assert (result.rc, result.stdout.count("2")) == (0, 2)
