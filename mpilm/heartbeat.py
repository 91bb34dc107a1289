"""Ranks that hang or lag are named: a thread of each tells where it is, in messages of its own.

    every rank      a beat to the watchers: my step, what I am doing, since when, how long I compute
    rank 0          nobody has got any further for too long, or a rank does not beat: asks all for their stacks,
                    tells who is missing and where everyone is, ends the job
    rank 1          the same if rank 0 does not beat
    the scribe      the rank that writes metrics.jsonl knows who lags

The thread computes nothing and waits for nobody, so it also beats while its rank is stuck in a sum or a message. It
needs MPI_THREAD_MULTIPLE.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpilm.config import Run
from mpilm.failure import wait_until_read
from mpilm.launch import World
from mpilm.log import warn
from mpilm.vigil import Beat, Vigil

HUNG = 77       # exit code
FILE = "hang.txt"
BEATS = 10      # in the time after which a silent rank counts as missing
LATE = 3        # periods without a turn of this thread
ANSWER_S = 3.0  # within which ranks tell their stacks
SMOOTH = 5      # steps, about, over which the time of one is averaged
TAG_BEAT, TAG_ASK, TAG_STACK = 1, 2, 3
STDERR = 2


@dataclass
class Where:
    """Where this rank is; the training thread writes it, the heart's reads it.

    Attributes:
        passes: Tells how many forward and backward passes are done.
        part: Number of the part of the model that this rank holds; ranks of one part have the same work.
        compute_s: What its own work of a step takes.
    """

    step: int = 0
    part: int = 0
    passes: Callable[[], int] = int
    doing: str = "starting"
    compute_s: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def enter(self, doing: str) -> None:
        """From now on it does something else."""
        self.doing, self.since = doing, time.monotonic()

    def computed(self, seconds: float) -> None:
        """Its own work of another step took so long."""
        self.compute_s = seconds if not self.compute_s else self.compute_s + (seconds - self.compute_s) / SMOOTH

    def beat(self) -> Beat:
        """All of it, for a message."""
        return Beat(self.step, self.passes(), self.doing, time.monotonic() - self.since, self.part, self.compute_s)


class Heart:
    """The thread. Local, but every rank of `comm` has one.

    Args:
        comm: Private to it.
        timeout_s: Without progress, or without a beat.
        slow: A rank is a straggler when its work takes so many times the median's.
        directory: Where `hang.txt` is written.
        scribe: The rank that wants to know who lags.
    """

    def __init__(self, comm: MPI.Comm, where: Where, *, timeout_s: float, slow: float, directory: str | Path,
                 scribe: int) -> None:
        self.comm, self.where, self.path = comm, where, Path(directory) / FILE
        self.vigil = Vigil(comm.size, timeout_s=timeout_s, slow=slow)
        self.period = timeout_s / BEATS
        self.watchers = [rank for rank in sorted({0, 1, scribe}) if rank < comm.size]
        self.sent: list[tuple[MPI.Request, Any]] = []
        self.stacks: dict[int, str] = {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop beating."""
        self.over.set()
        self.thread.join()

    @property
    def lagging(self) -> dict[int, float]:
        """Straggler -> how many times the median its own work takes; known to watchers."""
        return dict(self.vigil.lagging)

    def _live(self) -> None:
        try:
            last = time.monotonic()
            while not self.over.wait(self.period):
                now = time.monotonic()
                if now - last > LATE * self.period:     # this rank was stopped itself, and has heard nobody meanwhile
                    self.vigil.restart()
                last = now
                self._beat()
                self._listen()
                if self.comm.rank in self.watchers:
                    self._judge()
        except MPI.Exception:   # ranks have died: the training thread knows, and what follows has a heart of its own
            return

    def _beat(self) -> None:
        text = self.where.beat().to_text()
        for rank in self.watchers:
            self._send(text, rank, TAG_BEAT)

    def _send(self, text: str, rank: int, tag: int) -> None:
        self.sent = [entry for entry in self.sent if not entry[0].Test()]
        buffer = np.frombuffer(text.encode(), np.uint8)
        self.sent.append((self.comm.Isend(buffer, dest=rank, tag=tag), buffer))

    def _listen(self) -> None:
        status = MPI.Status()
        while self.comm.Iprobe(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG, status=status):
            buffer = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            self.comm.Recv(buffer, source=status.source, tag=status.tag)
            text = buffer.tobytes().decode(errors="replace")
            if status.tag == TAG_BEAT:
                self.vigil.hear(status.source, Beat.from_text(text))
            elif status.tag == TAG_ASK:
                self._send(stacks(), status.source, TAG_STACK)
            else:
                self.stacks[status.source] = text

    def _judge(self) -> None:
        for text in self.vigil.stragglers():
            if self.comm.rank == 0:
                warn(text)
        judges = self.comm.rank == 0 or (self.comm.rank == 1 and 0 in self.vigil.missing())
        if judges and self.vigil.hangs():
            self._end()

    def _end(self) -> None:
        for rank in range(self.comm.size):
            self._send("", rank, TAG_ASK)
        deadline = time.monotonic() + ANSWER_S
        answering = self.comm.size - len(self.vigil.missing())
        while len(self.stacks) < answering and time.monotonic() < deadline:
            self._listen()
            time.sleep(0.02)
        report = self.vigil.report(self.stacks)
        sys.stderr.write(report)
        sys.stderr.flush()
        try:
            self.path.write_text(report)
        except OSError as error:
            sys.stderr.write(f"{self.path}: {error.strerror}\n")
        wait_until_read(STDERR)
        MPI.COMM_WORLD.Abort(HUNG)


def stacks() -> str:
    """Where every thread of this process is, the training thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != threading.main_thread().ident)
    return f"on {socket.gethostname()}\n" + "".join(
        f"  thread {names.get(ident, ident)}\n" + "".join(traceback.format_stack(frame)) for ident, frame in frames
        if ident != threading.get_ident())


@contextmanager
def beating(world: World, config: Run, where: Where, scribe: int = 0) -> Iterator[Heart | None]:
    """A heart for the time of a block, see Heart; None where it is not wanted (`hang_timeout_s` 0), or where this MPI
    cannot be called from two threads, which is said. Collective over `world`."""
    if not config.hang_timeout_s:
        yield None
        return
    if world.thread_level < MPI.THREAD_MULTIPLE:
        warn("this MPI runs without MPI_THREAD_MULTIPLE: a rank that hangs is not noticed (--run.hang_timeout_s).")
        yield None
        return
    heart = Heart(world.dup("heartbeat"), where, timeout_s=config.hang_timeout_s, slow=config.straggler,
                  directory=config.dir, scribe=scribe)
    try:
        yield heart
    finally:
        heart.close()
