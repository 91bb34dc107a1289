"""Save while training goes on.

    save   copies the pieces to a snapshot and starts a thread                     (in the step: a memory copy)
           thread, every rank: write own files, checksum, fsync
    poll   all finished? -> rank 0 hears what everyone wrote and starts a thread   (in the step: a non-blocking vote)
           thread, rank 0: manifest, fsync, rename, remove what need not stay
    poll   finished? -> the checkpoint is complete, or every rank raises the same error

MPI is called from the training thread only; a step never waits for a disk.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpilm import marks
from mpilm.checkpoint import files, retention, tensorfile
from mpilm.checkpoint.agreement import Rounds, Task, raise_first
from mpilm.checkpoint.pieces import Piece, deal
from mpilm.log import UserError, say, warn

if TYPE_CHECKING:
    from mpi4py import MPI

FILE_BYTES = 2 << 30
NOTICED_S = 0.05


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete.

    Args:
        step: Of the run.
        path: Its directory.
        nbytes: Of all ranks.
        stall_s: What `save` took of the step.
        write_s: From `save` until it was seen to be complete.
    """

    step: int
    path: Path
    nbytes: int
    stall_s: float
    write_s: float


@dataclass
class _Job:
    place: files.Place
    meta: dict[str, Any]
    task: Task
    after: Callable[[], Saved | None]
    began: float
    stall_s: float = 0.0


class Writer:
    """Writes the checkpoints of a run. Every method is collective over `comm`.

    Args:
        directory: Of all checkpoints, seen by all ranks; made if it is not there. What killed jobs left is removed.
        comm: Private to this writer.
        keep_last: Keep so many of the newest.
        keep_every: Keep the multiples of this step for good; 0: none.
        spared: Keep the one of this step too.
        file_bytes: No file gets larger, apart from its header.

    Raises:
        UserError: The directory can't be made or read.
    """

    def __init__(self, directory: str | Path, comm: MPI.Comm, *, keep_last: int = 2, keep_every: int = 0,
                 spared: int = -1, file_bytes: int = FILE_BYTES) -> None:
        assert keep_last >= 1, "at least the newest stays"
        self.directory, self.comm = Path(directory), comm
        self.file_bytes = file_bytes
        self.kept = retention.Kept(keep_last, keep_every, spared)
        self._snapshot = files.Snapshot()
        self._rounds = Rounds(comm)
        self._job: _Job | None = None
        raise_first(comm, self._prepare() if comm.rank == 0 else None)

    def _prepare(self) -> UserError | None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            retention.sync(self.directory.parent)  # a power cut must not take the whole run
            removed, kept = retention.tidy(self.directory)
            if removed:
                say(f"{self.directory}: removed what an interrupted save left behind: {', '.join(removed)}")
            for error in kept:
                warn(f"{error.filename or self.directory}: {error.strerror}. An interrupted save left it behind; it is "
                     "in nobody's way.")
            return None
        except OSError as error:
            return UserError(f"{error.filename or self.directory}: {error.strerror}. Checkpoints go there.")

    def reserve(self, pieces: Sequence[Piece]) -> None:
        """Get the memory for snapshots of such pieces, so that the first `save` is as fast as the others.

        Raises:
            UserError: There is not enough of it on some rank.
        """
        nbytes = sum(piece.array.nbytes for piece in pieces)
        gaps = tensorfile.ALIGNMENT * len(deal(pieces, self.file_bytes))
        self._on_every_rank(partial(self._snapshot.reserve, nbytes + gaps))

    def save(self, step: int, pieces: Sequence[Piece], meta: dict[str, Any]) -> Saved | None:
        """Snapshot the pieces and return; they may change at once.

        An earlier save that is still being written is waited for.

        Args:
            step: Names the checkpoint. One that is already there is replaced.
            pieces: Of all ranks together: every element of every tensor once.
            meta: What JSON can hold; rank 0's counts.

        Returns:
            The earlier checkpoint, if it has become complete here.

        Raises:
            UserError: There is not enough space, or an earlier save failed; on every rank the same.
        """
        finished = self._finish_earlier(step)
        began = time.perf_counter()
        dealt = deal(pieces, self.file_bytes)
        needed = self.comm.allreduce(sum(piece.array.nbytes for piece in pieces))
        place = files.Place(self.directory, step, self.comm.rank, needed)
        meta = json.loads(json.dumps(meta))
        # Pieces may lie in memory that other ranks write: all have arrived before the copy, none leaves before its end.
        views: list[memoryview] = self._on_every_rank(partial(self._snapshot.copy, dealt))
        self._on_every_rank(partial(self._begin, place))
        announced = [replace(piece, array=piece.array[:0]) for piece in pieces]
        task = Task("checkpoint", partial(files.write_share, place, dealt, views, announced))
        self._job = _Job(place, meta, task, self._collect, began, time.perf_counter() - began)
        return finished

    def _finish_earlier(self, step: int) -> Saved | None:
        began = time.perf_counter()
        earlier = self.wait()
        waited = time.perf_counter() - began
        if earlier is not None and waited >= NOTICED_S:
            say(f"The save of step {step} waited {waited:.1f} s for that of step {earlier.step} to be written; "
                "a larger --checkpoint.every avoids that.")
        return earlier

    def _begin(self, place: files.Place) -> None:
        if place.rank == 0:
            try:
                files.begin(place)
            except OSError as error:
                raise place.failed(error) from error

    def _on_every_rank(self, function: Callable[[], Any]) -> Any:
        value, problem = None, None
        try:
            value = function()
        except MemoryError as error:
            problem = UserError(f"rank {self.comm.rank} has no memory for a snapshot of its checkpoint: {error}.")
        except UserError as error:
            problem = error
        raise_first(self.comm, problem)
        return value

    def poll(self) -> Saved | None:
        """See how a save is getting on; call it every step.

        Returns:
            A checkpoint that has just become complete.

        Raises:
            UserError: It could not be written; on every rank the same, at the same call.
        """
        saved = None
        if self._rounds.pending and self._rounds.answer():
            assert self._job is not None
            saved = self._job.after()
        if self._job is not None:
            self._rounds.ask(self._job.task.finished)
        return saved

    def wait(self) -> Saved | None:
        """Return when everything saved is complete; what it was, if anything. Raises as `poll` does."""
        saved = None
        while self._job is not None:
            if not self._rounds.pending:
                self._job.task.wait()
                self._rounds.ask(True)
            if self._rounds.answer():
                saved = self._job.after()
        return saved

    def abandon(self) -> None:
        """Return when no thread writes any more, without asking other ranks: they may be gone. Local."""
        if self._job is not None:
            self._job.task.wait()
        self._snapshot = files.Snapshot()

    def _collect(self) -> None:
        """Everyone has written: rank 0 goes on to the manifest."""
        job = self._require_job()
        records = self.comm.gather(job.task.value)
        job.task = Task("commit", partial(self._commit, job, records))
        job.after = self._conclude

    def _commit(self, job: _Job, records: list[dict[str, Any]] | None) -> list[str]:
        if records is None:
            return []
        remarks = files.commit(job.place, records, job.meta, self.kept,
                               write_s=round(time.perf_counter() - job.began, 3))
        marks.write(marks.SAVED)
        return remarks

    def _conclude(self) -> Saved:
        """It is complete."""
        job = self._require_job()
        self._job = None
        for text in self.comm.bcast(job.task.value):
            warn(text)
        path = self.directory / retention.name(job.place.step)
        return Saved(job.place.step, path, job.place.needed, job.stall_s, time.perf_counter() - job.began)

    def _require_job(self) -> _Job:
        """The job in hand, unless it failed on some rank."""
        job = self._job
        assert job is not None
        try:
            raise_first(self.comm, job.task.error)
        except Exception:
            self._job = None
            if self.comm.rank == 0:
                job.place.remove()
            self.comm.Barrier()
            raise
        return job
