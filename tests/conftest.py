"""The test frame: the same tests on every rank, one verdict for all, and no hang.

    mpirun -np 2 python -m pytest            every rank runs every test; rank 0 reports for all

Vote: after setup, call and teardown of each test all ranks exchange their outcomes; a failure on any is a failure on
all, so they stay in step and take the same way on. Grace: a rank that failed and sees no peers coming (they wait for
it inside the test) prints its failure and ends the job. Watchdog: when all are stuck, pytest's faulthandler_timeout
prints every stack and exits.

Beside: a test that starts a job mostly waits for it, so two runs share the tests, file by file (make test-1):

    export MPILM_TEST_BESIDE=DIR                    an empty folder, which then says what files have been taken
    mpirun -np 1 python -m pytest & mpirun -np 1 python -m pytest
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

gc.disable()    # until all tests are collected: modules stay
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("OMPI_MCA_btl", "^ofi")  # for one-sided messages, which nothing here sends; slow to start
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
os.environ.setdefault("MPIR_CVAR_POLLS_BEFORE_YIELD", "1")

from mpilm import failure, log, placement, startup  # noqa: E402

startup.start_mpi(placement.launcher(os.environ))

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from mpi4py import MPI  # noqa: E402

from mpilm.comm import p2p  # noqa: E402
from tests.helpers import Result, run_nested  # noqa: E402
from tests.selection import fits  # noqa: E402

atexit.register(MPI.Finalize)
# pytest's own temporary directories: ranks that share a root remove each other's.
TEMPORARY = tempfile.mkdtemp(prefix="mpilm-pytest-")
atexit.register(shutil.rmtree, TEMPORARY, ignore_errors=True)
os.environ["PYTEST_DEBUG_TEMPROOT"] = TEMPORARY
WORLD = MPI.COMM_WORLD
BALLOTS = WORLD.Dup()  # never matches a test's own messages
SPARE = 1900  # communicators that MPICH can still make after all tests
GRACE_S = float(os.environ.get("MPILM_TEST_GRACE_S", "15"))
BESIDE = os.environ.pop("MPILM_TEST_BESIDE", None)  # not for the jobs of tests
STDERR, COMM, DIRECTORY = pytest.StashKey[int](), pytest.StashKey[MPI.Comm](), pytest.StashKey[Path]()
FILES = pytest.StashKey[dict[Path, bool]]()     # whether this run has taken them

# Every rank must draw the same examples; a slow rank must not make one of them fail alone.
hypothesis.settings.register_profile(
    "mpilm", derandomize=True, deadline=None, database=None, max_examples=40 if WORLD.size <= 2 else 12,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture])
hypothesis.settings.load_profile("mpilm")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Ranks above 0 are quiet; a rank that is being killed shows where it was waiting."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        config.stash[STDERR] = os.dup(2)
    faulthandler.register(signal.SIGTERM, file=config.stash[STDERR], chain=True)
    if WORLD.rank > 0 and config.pluginmanager.has_plugin("terminalreporter"):
        config.pluginmanager.unregister(name="terminalreporter")


def pytest_report_header() -> str:
    """One line that tells MPI and ranks."""
    vendor, version = MPI.get_vendor()
    return f"mpi: {vendor} {'.'.join(map(str, version))}, {WORLD.size} ranks"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, on all ranks alike, what does not fit the number of ranks."""
    left_out = [item for item in items if not fits(item, WORLD.size)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if fits(item, WORLD.size)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Pass over, on all ranks alike, what another run has taken."""
    if BESIDE is None:
        return None
    files = item.config.stash.setdefault(FILES, {})
    if item.path not in files:
        name = str(item.path.relative_to(item.config.rootpath)).replace(os.sep, "+")
        files[item.path] = WORLD.bcast(_take(Path(BESIDE) / name) if WORLD.rank == 0 else None)
    if files[item.path]:
        return None
    item.session._setupstate.teardown_exact(nextitem)   # what the test before left up for this one
    return True


def _take(mark: Path) -> bool:
    """Whether this run is the first that wants a file."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def pytest_collection_finish(session: pytest.Session) -> None:
    """End everywhere when ranks do not have the same tests. Modules stay: looking through them for garbage, again and
    again, would take a sixth of all time."""
    gc.freeze()
    gc.enable()
    mine = [item.nodeid for item in session.items]
    ballots = _vote(session.config, (session.testsfailed, mine), failed=session.testsfailed > 0)
    if all(ballot == ballots[0] for ballot in ballots):
        return
    common = set.intersection(*(set(nodeids) for _, nodeids in ballots))
    lines = [f"[rank {rank}] {errors} errors in collection, alone has: {sorted(set(nodeids) - common)}"
             for rank, (errors, nodeids) in enumerate(ballots)]
    pytest.exit("ranks have different tests, or the same in another order\n" + "\n".join(lines), returncode=3)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Collective parts of fixtures, here where all ranks are: one may fail before it gets to the fixture itself."""
    log.setup(0)    # an earlier test's session has made ranks quiet
    if "comm" in item.fixturenames:
        item.stash[COMM] = WORLD.Dup()
    if "tmp_path_all" in item.fixturenames:
        made = tempfile.mkdtemp(prefix="mpilm-test-") if WORLD.rank == 0 else None
        item.stash[DIRECTORY] = Path(item.stash[COMM].bcast(made))


def _clean_up(item: pytest.Item) -> None:
    if WORLD.rank == 0 and DIRECTORY in item.stash:
        shutil.rmtree(item.stash[DIRECTORY], ignore_errors=True)
    if COMM in item.stash:
        item.stash[COMM].Free()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """The vote: the report of every rank becomes that of all."""
    report: pytest.TestReport = yield  # type: ignore[misc,assignment]
    ballot = (f"{item.nodeid} {call.when}", report.outcome, _words(report))
    ballots = _vote(item.config, ballot, failed=report.failed)
    if len({name for name, _, _ in ballots}) > 1:
        _abort(item.config, f"ranks are at different tests: {[name for name, _, _ in ballots]}")
    if call.when == "teardown":
        _clean_up(item)
    outcomes = {outcome for _, outcome, _ in ballots}
    if outcomes == {"failed"} and len({words for _, _, words in ballots}) == 1:
        return report  # type: ignore[return-value]
    if "failed" in outcomes or len(outcomes) > 1:
        report.outcome = "failed"
        report.longrepr = _culprits([(outcome, words) for _, outcome, words in ballots])
    return report  # type: ignore[return-value]


def _words(report: pytest.TestReport) -> str:
    if not report.failed:
        return ""
    captured = [f"--- {name} ---\n{text[-4000:]}" for name, text in report.sections]
    return re.sub(r"\b0x[0-9a-f]{6,}", "0x...", "\n".join([report.longreprtext, *captured]))


def _culprits(ballots: list[tuple[str, str]]) -> str:
    told: dict[tuple[str, str], list[int]] = {}
    for rank, ballot in enumerate(ballots):
        told.setdefault(ballot, []).append(rank)
    return "\n".join(f"[rank {', '.join(map(str, ranks))}] {outcome}\n{words}"
                     for (outcome, words), ranks in told.items() if outcome != "passed")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """The exit code of every rank is the highest of all; leftovers count as a failed test."""
    if exitstatus == pytest.ExitCode.OK and (leftovers := _leftovers()):
        os.write(session.config.stash[STDERR], f"\n[rank {WORLD.rank}] {leftovers}\n".encode())
        exitstatus = pytest.ExitCode.TESTS_FAILED
    stopped = exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    session.exitstatus = max(_vote(session.config, int(exitstatus), failed=stopped))


def _leftovers() -> str:
    """What tests did not give back: MPICH, which has 2,048 communicators, must have most of them at the end."""
    duplicates: list[MPI.Comm] = []
    try:
        duplicates.extend(WORLD.Dup() for _ in range(SPARE))
    except MPI.Exception:
        return f"tests left more than {2048 - SPARE} communicators behind; World.owns and World.dup give them back"
    finally:
        for duplicate in duplicates:
            duplicate.Free()
    return ""


def _vote(config: pytest.Config, ballot: Any, *, failed: bool) -> list[Any]:
    """Exchange ballots. A rank that failed waits for its peers only so long: they may wait for it inside the test."""
    digest = zlib.crc32(repr(ballot).encode())
    mine = np.array([failed, digest, -digest], np.int64)
    highest = np.empty_like(mine)
    gate, deadline = BALLOTS.Iallreduce(mine, highest, MPI.MAX), time.monotonic() + GRACE_S

    def arrived() -> bool | None:
        if failed and time.monotonic() > deadline:
            _abort(config, f"failed, and the others did not arrive within {GRACE_S:.0f} s\n{ballot[-1]}")
        return gate.Test() or None

    p2p.until(arrived)
    if not highest[0] and highest[1] == -highest[2]:
        return [ballot] * WORLD.size
    return BALLOTS.allgather(ballot)


def _abort(config: pytest.Config, text: str) -> None:
    os.write(config.stash[STDERR], f"\n[rank {WORLD.rank}] {text}\n".encode())
    failure.wait_until_read(config.stash[STDERR])
    WORLD.Abort(1)


@pytest.fixture
def comm(request: pytest.FixtureRequest) -> MPI.Comm:
    """A communicator over all ranks, for this test alone."""
    return request.node.stash[COMM]


@pytest.fixture
def tmp_path_all(request: pytest.FixtureRequest, comm: MPI.Comm) -> Path:
    """One directory that all ranks see; made by rank 0 and removed in the end."""
    return request.node.stash[DIRECTORY]


@pytest.fixture
def watch(pytestconfig: pytest.Config) -> Callable[[float], contextlib.AbstractContextManager[None]]:
    """`with watch(20):` ends the job, showing all stacks, when the body takes longer than so many seconds."""

    @contextlib.contextmanager
    def watching(seconds: float) -> Iterator[None]:
        def bark() -> None:
            faulthandler.dump_traceback(file=pytestconfig.stash[STDERR], all_threads=True)
            _abort(pytestconfig, f"still at it after {seconds} s")

        timer = threading.Timer(seconds, bark)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    return watching


@pytest.fixture
def run_mpi(comm: MPI.Comm) -> Callable[..., Result]:
    """`run_mpi(2, ["-m", "mpilm.train", ...], env={}, timeout=120)` -> Result(rc, stdout, stderr).

    A real mpirun, started by rank 0 of the test; the other ranks sleep until it is over. See `helpers.run_nested`.
    """

    def run(n: int, args: list[str], **options: Any) -> Result:
        outcome: Result | AssertionError | None = None
        if WORLD.rank == 0:
            try:
                outcome = run_nested(n, args, **options)
            except AssertionError as error:
                outcome = error
        gate = comm.Ibarrier()
        while not gate.Test():
            time.sleep(0.02)
        outcome = comm.bcast(outcome)
        if isinstance(outcome, AssertionError):
            raise outcome
        assert outcome is not None
        return outcome

    return run
