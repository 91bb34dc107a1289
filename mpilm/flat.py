"""Flat memory: what a synchronizer hands to the update."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, ClassVar, Protocol

import torch

MOST_ADDENDS = 16   # streams that a core reads at once; with so many it is still no slower than writing sums down
FLOAT_BYTES = 4
_numbers = itertools.count()    # of compiled functions


@dataclass(frozen=True)
class Flat:
    """A run of flat memory: float32 masters and optimizer states, and the weights the model computes with.

    All are 1-D and of equal length; `weights` may be the same memory as `masters`.

    Attributes:
        gradients: Float32; or several, in the dtype of the weights, whose sum they are (`add`), for an update that
            `adds`.
    """

    masters: torch.Tensor
    weights: torch.Tensor
    gradients: tuple[torch.Tensor, ...]
    states: tuple[torch.Tensor, ...]
    decay: bool

    @property
    def apart(self) -> bool:
        """Whether `weights` are other memory than `masters`."""
        return self.weights.data_ptr() != self.masters.data_ptr()

    def part(self, part: slice) -> Flat:
        """A part of it, the same memory."""
        gradients, states = (tuple(array[part] for array in arrays) for arrays in (self.gradients, self.states))
        return Flat(self.masters[part], self.weights[part], gradients, states, self.decay)

    def copy(self) -> Flat:
        """The same, of memory of its own."""
        masters = self.masters.clone()
        gradients, states = (tuple(array.clone() for array in arrays) for arrays in (self.gradients, self.states))
        return Flat(masters, self.weights.clone() if self.apart else masters, gradients, states, self.decay)


class Update(Protocol):
    """A rule that turns gradients into new parameters; local, and it cannot fail.

    Attributes:
        STATES: Names of its states, one float32 array each.
        adds: Whether it takes gradients that have still to be added up.
        lr: Of the next update.
        applied, skipped, skipped_in_a_row: Updates that were made, left out, and left out since the last one.
    """

    STATES: ClassVar[tuple[str, ...]]
    adds: bool
    lr: float
    applied: int
    skipped: int
    skipped_in_a_row: int

    def begin(self, step: int) -> None:
        """The next update is that of `step`."""

    def accept(self, grad_norm: float) -> float | None:
        """What gradients of this global norm are multiplied by; None if the step must be skipped."""

    def apply(self, flat: Flat, scale: float) -> None:
        """Update a run of flat memory, cut anywhere at a multiple of 16 elements."""


def bytes_unsummed(num_slots: int, replicas: int, *, element: int, buffers: int) -> int:
    """Of every element, that the gradients of a rank take if nobody sums them; 0 where they have to be summed.

    They need no more memory than their float32 sum with its `buffers`, are not too many to be read at once, and their
    tree is that of sums that are written: of slots first, and then of replicas.
    """
    nbytes = num_slots * element
    able = (replicas > 1 and num_slots * replicas <= MOST_ADDENDS and element < FLOAT_BYTES
            and nbytes <= buffers * FLOAT_BYTES and (num_slots == 1 or replicas & (replicas - 1) == 0))
    return nbytes if able else 0


@cache
def compile_code(function: Callable[..., Any], *kind: object) -> Callable[..., Any]:
    """torch.compile of a function of tensors of any length, on its first call; one for each `kind` of arguments.

    PyTorch compiles the same code eight times at most, whoever calls it, and then runs it as it is: other bits, and
    slowly. So this is code of its own; and whoever calls it with too many other arguments is told.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    made: Callable[..., Any] = torch.compile(FunctionType(code, function.__globals__), dynamic=True, fullgraph=True)
    return made


def add(addends: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their sum, float32, in the order of comm/order.py's `tree`."""
    if len(addends) == 1:
        return addends[0].float()
    middle = len(addends) // 2
    return add(addends[:middle]) + add(addends[middle:])
