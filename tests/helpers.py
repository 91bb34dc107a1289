"""What tests of several files need: verdicts that all ranks share, and programs started under a real mpirun.

    everywhere(comm, array[0] == 1, "first element")     fails on all ranks when it is false on any
    same_everywhere(comm, array)                         the same bits on all ranks
    run_nested(2, ["-m", "mpilm.train", ...])            mpirun of this environment's own MPI; .rc .stdout .stderr
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYD", "MPI_LOCAL", "MPIR_CVAR_", "PALS_", "OPAL_", "GLIBC_")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
FOR_NESTED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_btl": "^ofi",
    "OMPI_MCA_mpi_yield_when_idle": "1",    # another run of tests may be beside this one
}

# Open MPI's mpirun keeps its files in a folder named by its process id. One that is killed leaves them, and the next
# launcher that is given the same id cannot start: so each has a place of its own.
_SESSIONS = tempfile.TemporaryDirectory(prefix="mpilm-sessions-", ignore_cleanup_errors=True)


def everywhere(comm: Any, ok: bool, text: str = "") -> None:
    """Assert on all ranks what each has checked for itself; a hypothesis test stays in step this way."""
    if largest(comm, not ok):
        culprits = [rank for rank, fine in enumerate(comm.allgather(bool(ok))) if not fine]
        raise AssertionError(f"not so on rank {', '.join(map(str, culprits))}: {text}")


def same_everywhere(comm: Any, array: np.ndarray) -> None:
    """Assert that every rank holds the same dtype, shape and bits."""
    mine = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data)
    mine.update(f"{array.dtype} {array.shape}".encode())
    digest = int.from_bytes(mine.digest()[:7])
    if largest(comm, digest) != -largest(comm, -digest):
        held = comm.allgather((str(array.dtype), array.shape, mine.hexdigest()))
        raise AssertionError(f"ranks hold different arrays: {held}")


def largest(comm: Any, mine: int) -> int:
    """Of all ranks' integers. Ranks that wait leave their core to the others."""
    from mpi4py import MPI  # not for those who only start jobs

    from mpilm.comm import p2p

    given, found = np.array([mine], np.int64), np.empty(1, np.int64)    # mpi4py 4.1's request keeps only the second
    arrived = comm.Iallreduce(given, found, MPI.MAX)
    p2p.until(lambda: arrived.Test() or None)
    return int(found[0])


@dataclass(frozen=True)
class Result:
    """What a program left: exit code and what it printed."""

    rc: int
    stdout: str
    stderr: str


def mpirun() -> str:
    """The mpirun of this environment's MPI: PyPI's own, else the first on PATH."""
    own = Path(sys.prefix) / "bin" / "mpirun"
    found = str(own) if own.exists() else shutil.which("mpirun")
    assert found, "there is no mpirun"
    return found


def clean_environment() -> dict[str, str]:
    """The environment without what this rank's own launcher and the test frame put there."""
    kept = {key: value for key, value in os.environ.items()
            if not key.startswith(LAUNCHER_PREFIXES) and key not in THREADS}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), kept.get("PYTHONPATH")]))
    return kept | FOR_NESTED | {"PRTE_MCA_prte_tmpdir_base": tempfile.mkdtemp(dir=_SESSIONS.name)}


def start(n: int, args: Sequence[str], *, env: Mapping[str, str] | None = None, launcher: Sequence[str] = (),
          tuned: bool = False, **options: Any) -> subprocess.Popen[str]:
    """Start `python ARGS` on `n` ranks (0: without mpirun), in a session of its own; `options` are Popen's.

    A program of ours starts itself anew, to have another malloc, only where it is `tuned`: of jobs that take two
    seconds that is a sixth. Those of Slurm do.
    """
    own = [] if launcher and launcher[0].startswith("/") else [mpirun()]
    command = [*own, *launcher, "-np", str(n)] if n else []
    environment = clean_environment() | ({} if tuned else {"GLIBC_TUNABLES": ""}) | dict(env or {})
    with _all_cores():
        return subprocess.Popen([*command, sys.executable, *args], env=environment, stdin=subprocess.DEVNULL, text=True,
                                errors="replace", start_new_session=True, **options)


def run_nested(n: int, args: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = 120,
               cwd: str | Path | None = None, launcher: Sequence[str] = (), tuned: bool = False) -> Result:
    """Run `python ARGS` on `n` ranks (0: without mpirun). Not collective: call it on one rank.

    Args:
        n: Ranks.
        args: Command line after the interpreter.
        env: Added to a clean environment.
        timeout: Seconds; then the job is killed and the test fails with what it printed.
        cwd: Working directory.
        launcher: Further options of mpirun, or another mpirun when the first is an absolute path.
        tuned: As `start`.
    """
    process = start(n, args, env=env, launcher=launcher, tuned=tuned, cwd=cwd, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end(process)
        stdout, stderr = process.communicate(timeout=20)
        raise AssertionError(f"{' '.join(args)} ran past {timeout} s\n{stdout}\n{stderr}") from None
    return Result(process.returncode, stdout.replace("\0", ""), stderr.replace("\0", ""))


def end(process: subprocess.Popen[str]) -> None:
    """End a launcher and all it started, ranks too, which have process groups of their own: politely, then at once."""
    everyone = descendants(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    kill(everyone)


def descendants(pid: int) -> list[int]:
    """`pid` and every process below it."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def kill(processes: Sequence[int]) -> None:
    """SIGKILL each that is still there."""
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class _all_cores:  # noqa: N801 - used as a statement
    """A child inherits the cores of its parent; this rank may be bound to one of them."""

    def __enter__(self) -> None:
        self.own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))

    def __exit__(self, *error: object) -> None:
        os.sched_setaffinity(0, self.own)
