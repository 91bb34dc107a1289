"""Ranks that hang or lag are named: a thread of each tells where it is, in messages of its own.

    every rank      a beat to those who listen: my step, what I am doing, since when, how long I compute
    rank 0          hears all. Nobody has got any further for too long, or a rank does not beat: asks all for their
                    stacks, tells who is missing and where everyone is, ends the job
    rank 1          hears all, and does the same if rank 0 does not beat
    every other     hears the one before it, and does the same if that one is silent and nobody has asked: so of any
                    ranks that have stopped, ranks 0 and 1 among them, somebody is the next
    the scribe      the rank that writes metrics.jsonl hears all, and knows who lags

Ten times in the time after which a rank is missing, a minute apart by default, a rank sends four messages of a hundred
bytes, and rank 0, 1 and the scribe get one from everybody: nothing, for thousands of ranks.

The thread computes nothing and waits for nobody, so it also beats while its rank is stuck in a sum or a message. It
needs MPI_THREAD_MULTIPLE.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI

from mpilm.comm import p2p
from mpilm.config import Run
from mpilm.failure import wait_until_read
from mpilm.launch import World
from mpilm.log import warn
from mpilm.progress import Work
from mpilm.vigil import Beat, Vigil

HUNG = 77       # exit code
FILE = "hang.txt"
BEATS = 10      # in the time after which a silent rank counts as missing
TURN = 1.1      # times that, before a rank that hears one other takes it upon itself to judge
PATIENT = 5     # times as long as steps may take what happens once: a corpus is prepared, a program assembled
FOREVER = 1 << 30   # what somebody else's code takes is for them to say
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
        scribe: The rank that wants to know who lags.
        patience: See Beat.
    """

    step: int = 0
    part: int = 0
    scribe: int = 0
    passes: Callable[[], int] = int
    doing: str = "starting"
    patience: int = PATIENT
    compute_s: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def enter(self, doing: str, patience: int = 1) -> None:
        """From now on it does something else."""
        self.doing, self.patience, self.since = doing, patience, time.monotonic()

    def computed(self, seconds: float) -> None:
        """Its own work of another step took so long."""
        self.compute_s = seconds if not self.compute_s else self.compute_s + (seconds - self.compute_s) / SMOOTH

    def beat(self) -> Beat:
        """All of it, for a message."""
        done, for_s = self.passes() + Work.done, time.monotonic() - self.since
        return Beat(self.step, done, self.doing, for_s, self.part, self.compute_s, self.patience)


class Heart:
    """The thread. Local, but every rank of `comm` has one.

    Args:
        comm: Private to it.
        timeout_s: Without progress, or without a beat.
        slow: A rank is a straggler when its work takes so many times the median's.
        directory: Where `hang.txt` is written; None: nowhere.
    """

    def __init__(self, comm: MPI.Comm, where: Where, *, timeout_s: float, slow: float,
                 directory: str | Path | None) -> None:
        self.comm, self.where, self.directory = comm, where, directory
        self.hears_all = comm.rank < 2
        self.before, self.behind = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        self.vigil = Vigil(comm.size, timeout_s=timeout_s, slow=slow, watched=None if self.hears_all else [self.before])
        self.timeout_s, self.period = timeout_s, timeout_s / BEATS
        self.asked = -math.inf  # when a rank before this one wanted to know everything
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
        """Straggler -> how many times the median its own work takes; known to those who hear all."""
        return dict(self.vigil.lagging)

    def _live(self) -> None:
        try:
            last = time.monotonic()
            while not self.over.wait(self.period):
                self._beat()
                self._listen()
                before, last = last, time.monotonic()
                if last - before > LATE * self.period:  # this rank was stopped itself, and has heard nobody meanwhile
                    self.vigil.restart()
                else:
                    self._judge()
        except MPI.Exception:   # ranks have died: the training thread knows, and what follows has a heart of its own
            self._outlive()

    def _outlive(self) -> None:
        """Until then nobody can be asked anything: those who are left get together in good time, or this rank ends."""
        before = self.where.beat()
        while not any(self.over.wait(self.period) for _ in range(2 * BEATS)):   # while it is stopped it has no turns
            if (now := self.where.beat())[:3] == before[:3]:
                self._tell(f"error: the job hangs: a rank has died, and after {2 * self.timeout_s:g} s those who are "
                           f"left have not met. rank {self.comm.rank}: step {now.step}, {now.doing}\n{stacks()}")
            before = now

    def _beat(self) -> None:
        text = self.where.beat().to_text()
        for rank in {0, 1, self.where.scribe, self.behind}:
            if rank < self.comm.size:
                self._send(text, rank, TAG_BEAT)

    def _send(self, text: str, rank: int, tag: int) -> None:
        self.sent = [entry for entry in self.sent if not entry[0].Test()]
        buffer = np.frombuffer(text.encode(), np.uint8)
        self.sent.append((self.comm.Isend(buffer, dest=rank, tag=tag), buffer))

    def _listen(self) -> None:
        status = MPI.Status()
        while p2p.has_come(self.comm, status=status):
            buffer = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            self.comm.Recv(buffer, source=status.source, tag=status.tag)
            text = buffer.tobytes().decode(errors="replace")
            if status.tag == TAG_BEAT:
                self.vigil.hear(status.source, Beat.from_text(text))
            elif status.tag == TAG_ASK:
                if status.source < self.comm.rank:
                    self.asked = time.monotonic()
                self._send(f"{self.where.beat().to_text()}\n{stacks()}", status.source, TAG_STACK)
            else:
                beat, _, self.stacks[status.source] = text.partition("\n")
                self.vigil.beats[status.source] = Beat.from_text(beat)

    def _judge(self) -> None:
        for text in self.vigil.stragglers():
            if self.comm.rank == 0:
                warn(text)
        if self.comm.rank == 0 or (self.comm.rank == 1 and 0 in self.vigil.missing()):
            ends = self.vigil.hangs()
        else:
            ends = not self.hears_all and self.vigil.silence(self.before) > TURN * self.timeout_s
        if ends and not self._stands_back():
            self._end()

    def _stands_back(self) -> bool:
        return time.monotonic() - self.asked < self.timeout_s

    def _end(self) -> None:
        for rank in range(self.comm.size):
            self._send("", rank, TAG_ASK)
        deadline = time.monotonic() + ANSWER_S
        answering = self.comm.size - (len(self.vigil.missing()) if self.hears_all else 0)
        while len(self.stacks) < answering and time.monotonic() < deadline:
            self._listen()
            time.sleep(0.02)
        if self._stands_back():     # two have noticed at the same time
            return
        # Who waits for answers does not beat meanwhile, and a beat may be kept back: whoever answers is there.
        suspects = self.vigil.missing() if self.hears_all else range(self.comm.size)
        self._tell(self.vigil.report(self.stacks, [rank for rank in suspects if rank not in self.stacks]))

    def _tell(self, report: str) -> NoReturn:
        sys.stderr.write(report)
        sys.stderr.flush()
        if self.directory is not None:
            path = Path(self.directory) / FILE
            try:
                path.write_text(time.strftime("%Y-%m-%d %H:%M:%S %z\n") + report)     # it stays when the run goes on
            except OSError as error:
                sys.stderr.write(f"{path}: {error.strerror}\n")
        wait_until_read(STDERR)
        MPI.COMM_WORLD.Abort(HUNG)
        os._exit(HUNG)


def stacks() -> str:
    """Where every thread of this process is, the training thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != threading.main_thread().ident)
    return f"on {socket.gethostname()}\n" + "".join(
        f"  thread {names.get(ident, ident)}\n" + "".join(traceback.format_stack(frame)) for ident, frame in frames
        if ident != threading.get_ident())


class Pulse:
    """One heart after the other: a run has a new one, over those who are left, after every death.

    There is none where it is not wanted (`hang_timeout_s` 0), or where this MPI cannot be called from two threads,
    which is said.

    Args:
        keeps: The run has a directory, and what hangs is written there too.

    Attributes:
        where: What this rank is doing; a new one with every heart.
    """

    def __init__(self, config: Run, *, keeps: bool = True) -> None:
        self.config, self.keeps, self.where = config, keeps, Where()
        self.world: World | None = None
        self.heart: Heart | None = None

    def over(self, world: World) -> Where:
        """Beat for this world from now on, and no other. Collective over it.

        Raises:
            MPI.Exception: Somebody has died.
        """
        if world is self.world:
            return self.where
        self.close()
        self.world, self.where = world, Where()
        if not self.config.hang_timeout_s:
            return self.where
        if world.thread_level < MPI.THREAD_MULTIPLE:
            warn("this MPI runs without MPI_THREAD_MULTIPLE: a rank that hangs is not noticed (--run.hang_timeout_s).")
            return self.where
        self.heart = Heart(world.dup("heartbeat"), self.where, timeout_s=self.config.hang_timeout_s,
                           slow=self.config.straggler, directory=self.config.dir if self.keeps else None)
        return self.where

    def close(self) -> None:
        """Stop beating. Local."""
        if self.heart is not None:
            self.heart.close()
            self.heart = None
