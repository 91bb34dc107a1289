"""When a run is saved: as `interval.py` says and at the end, while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from mpilm import origin
from mpilm.checkpoint import Piece, Reader, Saved, Writer
from mpilm.config import Checkpoint, Config
from mpilm.failure import on_root
from mpilm.interval import Interval
from mpilm.model.slices import Slices
from mpilm.origin import CHECKPOINTS
from mpilm.state import TrainState, describe, pieces
from mpilm.sync._buckets import Run


class Holder(Protocol):
    """Whoever holds parameters and optimizer state."""

    def runs(self, part: int, parts: int) -> list[Run]:
        """Share number `part` of everything a resume needs; the `parts` shares cover it exactly once."""


def writer(config: Config, comm: Any) -> Writer:
    """Of the run's checkpoints. Collective over `comm`, which is private to it."""
    return Writer(Path(config.run.dir) / CHECKPOINTS, comm, keep_last=config.checkpoint.keep_last,
                  keep_every=config.checkpoint.keep_every, spared=on_root(comm, lambda: origin.spared(config)))


class Saver:
    """Hands this rank's share of all tensors to the writer. Collective over the writer's ranks, like every method.

    Args:
        holds: What this rank has to save.
        slices: What of the model's tensors it holds.
        comm: The ranks that hold the same of them, and share the work of writing it.
        about: What the manifest says about the run besides its state.
        reader: The checkpoint that the run was resumed from, or None.

    Attributes:
        path: The newest complete checkpoint of this run, or None.
        save_s: What the last save took, in seconds; at first, what that of `reader` did.
    """

    def __init__(self, writer: Writer, holds: Holder, slices: Slices, comm: Any, config: Checkpoint, *,
                 about: dict[str, Any], reader: Reader | None) -> None:
        self.writer, self.holds, self.slices, self.comm = writer, holds, slices, comm
        self.interval = Interval(config, reader.step if reader else 0)
        self.about, self.saved = about, reader.step if reader and _ours(reader, writer) else -1
        self.path: Path | None = reader.path if reader else None
        self.save_s = reader.write_s if reader else 0.0
        writer.reserve(self._mine())

    def after_step(self, state: TrainState, *, last: bool, sound: bool) -> None:
        """Save if it is time to; otherwise see how an earlier save is getting on.

        Args:
            sound: The last update was made. What may be broken takes no place that a checkpoint from before has.
        """
        self.poll()
        if (last or (sound and self.interval.due(state.step))) and state.step != self.saved:
            self._note(self.writer.save(state.step, self._mine(), describe(state, self.about)))
            self.saved = state.step
            self.interval.saved(state.step)

    def poll(self) -> None:
        """See how an earlier save is getting on."""
        self._note(self.writer.poll())

    def pieces(self, part: int, parts: int) -> list[Piece]:
        """Share number `part` of what ranks like this one hold."""
        return list(pieces(self.slices, self.holds.runs(part, parts)))

    def _mine(self) -> list[Piece]:
        return self.pieces(self.comm.rank, self.comm.size)

    def abandon(self) -> None:
        """Leave what is under way; it never becomes a checkpoint. Local."""
        self.writer.abandon()

    def wait(self) -> None:
        """Return when everything saved is complete on disk."""
        self._note(self.writer.wait())

    def _note(self, saved: Saved | None) -> None:
        if saved is not None:
            self.path, self.save_s = saved.path, saved.write_s
            self.interval.learn(saved, self.writer.comm)


def _ours(reader: Reader, writer: Writer) -> bool:
    """Whether it is among the checkpoints that are written here."""
    return reader.path.resolve().parent == writer.directory.resolve()


class Elsewhere:
    """In place of a Saver on ranks that have nothing to save: servers do it, at steps at which all wait for each other.

    Attributes:
        path: Is known to those who save.
    """

    path: Path | None = None
    save_s = 0.0

    def after_step(self, state: TrainState, *, last: bool, sound: bool) -> None:
        """Nothing."""

    def wait(self) -> None:
        """Nothing."""

    def abandon(self) -> None:
        """Nothing."""
