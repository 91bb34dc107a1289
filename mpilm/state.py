"""What a resume needs, between a synchronizer's flat memory and a checkpoint's logical tensors.

A parameter of the program may hold several tensors of the world (queries, keys and values are one
matrix; see model/shape.py). Tensors are runs of a parameter's rows, so a run of flat memory is a
few runs of tensors, and the other way round; nothing here depends on the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mpilm.checkpoint import Piece, Reader
from mpilm.log import say
from mpilm.model import init
from mpilm.model.shape import Shape

MODEL = "model"
Read = Callable[[str, str, int, int], np.ndarray]


@dataclass
class TrainState:
    """Everything besides tensors that changes from step to step."""

    step: int = 0
    applied: int = 0
    skipped: int = 0


def pieces(shape: Shape, runs: Iterable[tuple[str, str, int, np.ndarray]]) -> Iterator[Piece]:
    """The tensors' pieces that runs (state, parameter, first element, values) of flat memory hold; views."""
    for state, parameter, first, values in runs:
        for tensor, dimensions, start, offset, count in _tensors_in(shape, parameter, first, values.size):
            yield Piece(f"{state}.{tensor}", dimensions, start, values[offset:offset + count])


def from_checkpoint(shape: Shape, reader: Reader) -> Read:
    """Reads runs of parameters and optimizer state from a checkpoint.

    A state that it has nothing of, because what wrote it had no use for it, is zero as at the beginning of a run.
    """
    there = {tensor.partition(".")[0] for tensor in reader.tensors}

    def read(state: str, parameter: str, first: int, count: int) -> np.ndarray:
        if state not in there:
            return np.zeros(count, np.float32)
        return np.concatenate([reader.read(f"{state}.{tensor}", start, number)
                               for tensor, _, start, _, number in _tensors_in(shape, parameter, first, count)])
    return read


def initial(shape: Shape, seed: int) -> Read:
    """Draws initial weights by tensor name; optimizer state is zero."""
    def read(state: str, parameter: str, first: int, count: int) -> np.ndarray:
        if state != MODEL:
            return np.zeros(count, np.float32)
        tensors = [init.draw(name, dimensions, seed=seed, layers=shape.layers)
                   for name, dimensions in shape.parts(parameter).items()]
        return np.concatenate([tensor.numpy().reshape(-1) for tensor in tensors])[first:first + count]
    return read


def _tensors_in(shape: Shape, parameter: str, first: int,
                count: int) -> Iterator[tuple[str, tuple[int, ...], int, int, int]]:
    """(tensor, its shape, first element in it, offset in the run, elements) of a run of a parameter."""
    begin = 0
    for tensor, dimensions in shape.parts(parameter).items():
        end = begin + prod(dimensions)
        low, high = max(first, begin), min(first + count, end)
        if low < high:
            yield tensor, dimensions, low - begin, low - first, high - low
        begin = end


def describe(state: TrainState, about: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says besides its tensors."""
    return {**about, "state": vars(state).copy()}


def values(shape: Shape, seed: int, reader: Reader | None) -> Read:
    """Where parameters and optimizer state come from."""
    return initial(shape, seed) if reader is None else from_checkpoint(shape, reader)


def start(reader: Reader | None) -> TrainState:
    """Where the run goes on; says so."""
    if reader is None:
        return TrainState()
    state = TrainState(**reader.meta["state"])
    say(f"resumed from {reader.path} at step {state.step}")
    return state
