"""A contender as a job of its own: processes started once, warmed up, then run a few steps at a time.

    with Job(who, case, cores=(0, 1), size=2) as job:       # starts it and waits until it is ready
        seconds = job.run(steps=4)                          # of its slowest process

Every contender gets the environment that a user's shell would give it: nothing of this benchmark's own launcher,
threads as the contender's layout has it, and malloc's defaults unless it is a "-tuned" one.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from mpilm import startup
from mpilm.bench import _memory
from mpilm.bench._child import SOCKET, share
from mpilm.bench._contenders import Case, Who

TIMEOUT_S = 600.0  # of a start or of a command: compiling may take minutes
POLL_S = 0.2
LAST_WORDS_S = 5.0
LINES_OF_LOG = 30
LAUNCHER = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYD", "MPI_LOCAL", "MPIR_CVAR_", "MPICH_", "PALS_", "OPAL_", "SLURM_")
THREADS = ("OMP_", "MKL_", "OPENBLAS_", "GOMP_", "KMP_")
MALLOC = ("GLIBC_", "MALLOC_")
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
CROWDED = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1"}


class JobError(Exception):
    """A contender could not be started, or ended before its time; the message has the end of what it printed."""


class Job:
    """A contender's processes, driven from here.

    Args:
        who: Which contender.
        case: What it trains.
        cores: Logical CPUs of all its processes together.
        size: Processes, unless the contender is one by nature.
    """

    def __init__(self, who: Who, case: Case, *, cores: Sequence[int], size: int) -> None:
        self.who, self.case, self.cores = who, case, tuple(cores)
        self.layout = who.load().LAYOUT
        self.size = 1 if self.layout == "one" else size
        self.directory = Path(tempfile.mkdtemp(prefix="mpilm-bench-"))
        self.max_rss = 0
        self.loss = float("nan")
        self.told: list[dict[str, float]] = []  # seconds by what for, of every process in the last run
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[socket.socket] = []
        self._files: list[IO[str]] = []
        self.pids: list[int] = []

    def __enter__(self) -> Job:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, steps: int) -> float:
        """Train; seconds of the slowest process."""
        try:
            for connection in self._connections:
                connection.sendall(json.dumps({"steps": steps}).encode() + b"\n")
        except OSError:
            raise JobError(self._report("ended")) from None
        replies = self._replies()
        self.max_rss = max(self.max_rss, *(reply["max_rss_kib"] * 1024 for reply in replies))
        self.told = [reply["told"] for reply in sorted(replies, key=lambda reply: int(reply["rank"]))]
        self.loss = sum(reply["losses"][-1] for reply in replies) / len(replies)
        if not abs(self.loss) < float("inf"):
            raise JobError(f"{self.who.name}: the loss is {self.loss}.")
        return max(float(reply["seconds"]) for reply in replies)

    def peak_memory(self, steps: int, *, of: Callable[[int], int] = _memory.pss) -> int:
        """Train; bytes of the process that needed most of it, in whichever way of _memory.py."""
        with _memory.peak(self.pids, of) as peaks:
            self.run(steps)
        return max(peaks)

    def close(self) -> None:
        """Let the processes leave; whoever stays is ended."""
        for file in self._files:
            file.close()
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener, open(self.directory / "log", "wb") as log:
            listener.bind(str(self.directory / SOCKET))
            listener.listen(self.size)
            listener.settimeout(POLL_S)
            for command in self._commands():
                self._processes.append(subprocess.Popen(
                    command, env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True))
            self._accept(listener)

    def _commands(self) -> list[list[str]]:
        who = {"name": self.who.name, "file": self.who.file, "tuned": self.who.tuned, "folder": self.who.folder}
        task = {"who": who, "variants": sorted(self.who.variants), "case": asdict(self.case),
                "cores": self.cores, "directory": str(self.directory)}
        program = [sys.executable, "-m", "mpilm.bench._child", json.dumps(task)]
        if self.layout == "mpi":
            return [[*mpirun(), "-np", str(self.size), *program]]
        return [[*program, str(rank), str(self.size)] for rank in range(self.size)]

    def _environment(self) -> dict[str, str]:
        threads = len(share(self.cores, 0, self.size))
        # What a launcher that is killed leaves behind could stop a later one with the same process id.
        own = {"PRTE_MCA_prte_tmpdir_base": str(self.directory)}
        return environment(os.environ, threads=threads, tuned=self.who.tuned) | own

    def _accept(self, listener: socket.socket) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while len(self._connections) < self.size:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                self._check_alive(deadline)
                continue
            connection.settimeout(None)
            self._connections.append(connection)
            self._files.append(connection.makefile("r", encoding="utf-8"))
            self.pids.append(json.loads(self._files[-1].readline())["pid"])

    def _replies(self) -> list[dict[str, Any]]:
        """One line of every process, in whichever order they come."""
        deadline = time.monotonic() + TIMEOUT_S
        replies = []
        with selectors.DefaultSelector() as waiting:
            for connection, file in zip(self._connections, self._files, strict=True):
                waiting.register(connection, selectors.EVENT_READ, file)
            while waiting.get_map():
                for key, _ in waiting.select(POLL_S):
                    waiting.unregister(key.fileobj)
                    replies.append(self._reply(key.data))
                self._check_alive(deadline)
        return replies

    def _reply(self, file: IO[str]) -> dict[str, Any]:
        try:
            line = file.readline()
        except OSError:
            line = ""
        if not line.endswith("\n"):
            raise JobError(self._report("ended"))
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _check_alive(self, deadline: float) -> None:
        if any(process.poll() is not None for process in self._processes):
            raise JobError(self._report("ended"))
        if time.monotonic() > deadline:
            raise JobError(self._report(f"did not answer for {TIMEOUT_S:.0f} s"))

    def _report(self, what: str) -> str:
        self._let_end()
        lines = (self.directory / "log").read_text(errors="replace").splitlines()[-LINES_OF_LOG:]
        return "\n".join([f"{self.who.name} {what}; the last it printed:", *lines])

    def _let_end(self) -> None:
        """A launcher whose rank failed writes down what that rank said, and only then ends."""
        deadline = time.monotonic() + LAST_WORDS_S
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(POLL_S)


def environment(base: Mapping[str, str], *, threads: int, tuned: bool) -> dict[str, str]:
    """A contender's environment: `base` without what launchers, thread and malloc settings put there, and its own."""
    kept = {key: value for key, value in base.items() if not key.startswith((*LAUNCHER, *THREADS, *MALLOC))}
    added = {"OMP_NUM_THREADS": str(threads), **ROOT, **CROWDED}
    return kept | added | ({"GLIBC_TUNABLES": startup.MALLOC} if tuned else {})


def mpirun() -> list[str]:
    """The mpirun of this environment's MPI, told not to bind: a process pins itself."""
    from mpi4py import MPI

    own = Path(sys.prefix) / "bin" / "mpirun"
    found = str(own) if own.exists() else shutil.which("mpirun")
    if found is None:
        raise JobError("There is no mpirun on PATH, which our own contender needs.")
    return [found, *(["--bind-to", "none"] if MPI.get_vendor()[0] == "Open MPI" else [])]
