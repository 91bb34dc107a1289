"""What a resume needs, between a synchronizer's flat memory and a checkpoint's logical tensors.

A parameter of the program may hold several tensors of the world (queries, keys and values are one
matrix; see model/shape.py), and of each only what is this rank's (model/slices.py). So a run of flat
memory is a few runs of tensors, or of columns of them; what is written does not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mpilm.checkpoint import Piece, Reader
from mpilm.flat import Update
from mpilm.log import say
from mpilm.model import init
from mpilm.model.slices import Part, Slices

MODEL = "model"
Read = Callable[[str, str, int, int], np.ndarray]


@dataclass
class TrainState:
    """Everything besides tensors that changes from step to step; counts are those of an update."""

    step: int = 0
    applied: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    @classmethod
    def after(cls, step: int, update: Update) -> TrainState:
        """So many steps with this update."""
        return cls(step, update.applied, update.skipped, update.skipped_in_a_row)

    def resume(self, update: Update) -> None:
        """Have the update go on from here."""
        update.applied, update.skipped = self.applied, self.skipped
        update.skipped_in_a_row = self.skipped_in_a_row


class Owed(NamedTuple):
    """What there is to tell of a checkpoint's step: whoever goes on from there tells it, as maybe nobody has."""

    loss: float
    grad_norm: float
    lr: float


@dataclass(frozen=True)
class Past:
    """What a program takes over from one whose ranks have died, besides what is in its checkpoints."""

    since: float = math.nan     # when the death was noticed, by time.perf_counter
    ranks: int = 0              # that trained before anyone died
    speeds: list[float] = field(default_factory=list)   # tokens/s so far
    arithmetic: dict[str, Any] = field(default_factory=dict)


def pieces(slices: Slices, runs: Iterable[tuple[str, str, int, np.ndarray]]) -> Iterator[Piece]:
    """The tensors' pieces that runs (state, parameter, first element, values) of flat memory hold; views. Of what all
    ranks hold, one of them has the pieces."""
    for state, parameter, first, values in runs:
        for offset, part in slices.runs(parameter, first, values.size) if slices.writes(parameter) else ():
            yield Piece(f"{state}.{part.tensor}", part.shape, part.start, values[offset:offset + part.count],
                        part.columns)


def from_checkpoint(slices: Slices, reader: Reader) -> Read:
    """Reads runs of parameters and optimizer state from a checkpoint.

    A state that it has nothing of, because what wrote it had no use for it, or none for this parameter, is zero as at
    the beginning of a run.
    """
    def read(state: str, parameter: str, first: int, count: int) -> np.ndarray:
        return np.concatenate([_part(reader, f"{state}.{part.tensor}", part, missing=state != MODEL)
                               for _, part in slices.runs(parameter, first, count)])
    return read


def _part(reader: Reader, tensor: str, part: Part, *, missing: bool) -> np.ndarray:
    """A part of a tensor, which may be missing."""
    if missing and tensor not in reader.tensors:
        return np.zeros(part.count, np.float32)
    return reader.read(tensor, part.start, part.count, part.columns)


def initial(slices: Slices, seed: int) -> Read:
    """Draws initial weights by tensor name; optimizer state is zero."""
    layers, tied = slices.shape.layers, slices.shape.tied_embeddings

    def read(state: str, parameter: str, first: int, count: int) -> np.ndarray:
        if state != MODEL:
            return np.zeros(count, np.float32)
        return np.concatenate([part.cut(init.draw(part.tensor, part.shape, seed=seed, layers=layers, tied=tied).numpy())
                               for _, part in slices.runs(parameter, first, count)])
    return read


def describe(state: TrainState, about: dict[str, Any], owed: Owed | None = None) -> dict[str, Any]:
    """What a checkpoint's manifest says besides its tensors."""
    return {**about, "state": vars(state).copy(), **({"owed": owed._asdict()} if owed else {})}


def owed(reader: Reader | None) -> Owed | None:
    """What there is to tell of a checkpoint's step."""
    return Owed(**reader.meta["owed"]) if reader is not None and "owed" in reader.meta else None


def values(slices: Slices, seed: int, reader: Reader | None) -> Read:
    """Where parameters and optimizer state come from."""
    return initial(slices, seed) if reader is None else from_checkpoint(slices, reader)


def start(reader: Reader | None) -> TrainState:
    """Where the run goes on; says so."""
    if reader is None:
        return TrainState()
    state = TrainState(**reader.meta["state"])
    say(f"resumed from {reader.path} at step {state.step}")
    return state
