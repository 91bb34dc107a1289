"""Where a bucket's gradients are collected and summed: whole, or only on their way to the rank that owns them.

    Whole       a full-length buffer, summed over my slots; reduced once a step
    Passing     a full-length place for the time of one slot; the sums over ranks are added up over slots in the owner's
                segment. Two `Room`s, which buckets use in turns, serve all of them:

                backward of a slot     | bucket 0: room 0 | bucket 1: room 1 | bucket 2: room 0, once 0 is through |
                communication thread                      | bucket 0 ------> | bucket 1 ------>

                A backward pass in two halves has places of several slots under way: one in the room, others beside.

Both add slots by the binary counter of _slots.py. `Passing` sums over ranks before it sums over slots, so in the fixed
order the k-th slots of all ranks must be a subtree: they are dealt in turns (order.turns).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mpilm import bridge
from mpilm.comm.collectives import Then, nothing_more
from mpilm.comm.worker import Call, Inline, Worker
from mpilm.sync._layout import Layout, Member
from mpilm.sync._slots import Visit, num_buffers

Allocate = Callable[[int, npt.DTypeLike], Any]


class Reduce(Protocol):
    """As a collective's `reduce`. The parts that `then` is told of may reach beyond what is of use to this rank, as the
    whole buffer does: it takes what is this rank's."""

    def __call__(self, buffer: Any, then: Then = nothing_more, /) -> None: ...


def afterwards(sum_up: Callable[[Any], None]) -> Reduce:
    """sum_up(buffer), and then the whole of it at once."""
    def reduce(buffer: Any, then: Then = nothing_more) -> None:
        sum_up(buffer)
        then(slice(0, len(buffer)))
    return reduce


class Summed(Protocol):
    """What an update asks of gradients.

    Attributes:
        addends: My segment of the sum over all slots of all ranks, once everything has departed and arrived: float32,
            or what it is the sum of (_unsummed.py).
        nbytes: Held for it at all times.
    """

    nbytes: int

    @property
    def addends(self) -> tuple[torch.Tensor, ...]: ...


class Written:
    """As Summed: a sum that is in memory.

    Attributes:
        own: float32, my segment.
        values: The same, as an array.
    """

    own: torch.Tensor
    values: Any

    @property
    def addends(self) -> tuple[torch.Tensor, ...]:
        """As Summed."""
        return self.own,


class Gradients(Summed, Protocol):
    """What a bucket asks of its gradients besides."""

    def visit(self, member: Member, slot: int, gradient: torch.Tensor | None) -> None:
        """Take in one parameter's gradient of my slot number `slot`; None means zero."""

    def depart(self, slot: int) -> Callable[[Then], None]:
        """The gradients of `slot` are all there; returns what the communication thread has to do. That is given what to
        do with sums when they are there, part by part, as `Reduce`. Collective."""

    def departed(self, slot: int, future: Call) -> None:
        """It will be done when `future` is."""


class Whole(Written):
    """Gradients at full length.

    Args:
        allocate: The collective's.
        reduce: The collective's way to sum so that segment `own` is right.
    """

    def __init__(self, layout: Layout, allocate: Allocate, reduce: Reduce, own: slice, visits: Sequence[Visit]) -> None:
        self.reduced, self._reduce, self.visits = allocate(layout.count, np.float32), reduce, visits
        whole = bridge.tensor(self.reduced, torch.float32)
        self.buffers = [whole, *(torch.zeros_like(whole) for _ in range(num_buffers(visits) - 1))]
        self.own, self.values = whole[own], self.reduced[own]
        self.nbytes = len(self.buffers) * self.reduced.nbytes

    def visit(self, member: Member, slot: int, gradient: torch.Tensor | None) -> None:
        """As Gradients."""
        run = slice(member.start, member.start + member.count)
        count(self.buffers, run, self.visits[slot], gradient)

    def depart(self, slot: int) -> Callable[[Then], None]:
        """As Gradients; it is called for the last slot only."""
        return partial(self._reduce, self.reduced)

    def departed(self, slot: int, future: Call) -> None:
        """As Gradients."""


class Room:
    """Memory for one bucket of at most `most` elements at a time. Collective over the collective's communicator."""

    def __init__(self, most: int, collective: Any, worker: Worker | Inline) -> None:
        self.memory, self.worker = collective.allocate(most, np.float32), worker
        self.filling = False
        self.leaving: Call | None = None

    def take(self, length: int) -> Any:
        """`length` elements, once what was there is through; None while another bucket fills it."""
        if self.filling:
            return None
        if self.leaving is not None:
            self.worker.until(self.leaving)
        self.filling, self.leaving = True, None
        return self.memory[:length]

    def leave(self, future: Call) -> None:
        """What is there will be through when `future` is."""
        self.filling, self.leaving = False, future


class Passing(Written):
    """Gradients that are kept in my segment only."""

    def __init__(self, layout: Layout, collective: Any, own: slice, visits: Sequence[Visit], room: Room) -> None:
        self.layout, self.collective, self.segment, self.visits, self.room = layout, collective, own, visits, room
        self.sums = [torch.zeros(own.stop - own.start, device=collective.device.torch)
                     for _ in range(num_buffers(visits))]
        self.own, self.values = self.sums[0], bridge.array(self.sums[0])
        self.nbytes = sum(total.nbytes for total in self.sums)
        self.places: dict[int, Any] = {}     # by slot: a backward pass in two halves has several under way
        self.in_room: int | None = None             # the slot whose place is there

    def visit(self, member: Member, slot: int, gradient: torch.Tensor | None) -> None:
        """As Gradients."""
        if slot not in self.places:
            self.places[slot] = self._take(slot)
        put(gradient, bridge.tensor(self.places[slot][member.start:member.start + member.count], torch.float32))

    def _take(self, slot: int) -> Any:
        """A place for a slot; gaps between members are zero. Memory of its own where the room is in use."""
        place = self.room.take(self.layout.count)
        if place is None:
            place = self.collective.device.zeros(self.layout.count, np.float32)
        else:
            self.in_room = slot
        for gap in self.layout.gaps():
            place[gap] = 0
        return place

    def depart(self, slot: int) -> Callable[[Then], None]:
        """As Gradients."""
        place = self.places.pop(slot)

        def pass_on(then: Then) -> None:
            self.collective.reduce_scatter(place)
            count(self.sums, slice(None), self.visits[slot], bridge.tensor(place[self.segment], torch.float32))
            then(self.segment)
        return pass_on

    def departed(self, slot: int, future: Call) -> None:
        """As Gradients."""
        if slot == self.in_room:
            self.in_room = None
            self.room.leave(future)


def count(buffers: Sequence[torch.Tensor], run: slice, visit: Visit, gradient: torch.Tensor | None) -> None:
    """One step of the binary counter, on `run` of all buffers; None means zero."""
    into = buffers[visit.into][run]
    if visit.fresh:
        put(gradient, into)
    elif gradient is not None and gradient.is_sparse:
        rows, sums = _rows(gradient)
        into.view(gradient.shape).index_add_(0, rows, sums.to(into.dtype))
    elif gradient is not None:
        into.add_(gradient.reshape(-1))
    for lower in range(visit.into - 1, visit.into - 1 - visit.folds, -1):
        buffers[lower][run].add_(buffers[lower + 1][run])


def put(gradient: torch.Tensor | None, into: torch.Tensor) -> None:
    """Make `into`, 1-D, the gradient; None means zero."""
    if gradient is None:
        into.zero_()
    elif gradient.is_sparse:
        rows, sums = _rows(gradient)
        into.zero_().view(gradient.shape).index_copy_(0, rows, sums.to(into.dtype))
    else:
        into.copy_(gradient.reshape(-1))


def _rows(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers of the rows of a sparse gradient, each once; the sums of what it has for each, in its order and dtype).

    A slot is summed by itself, and rounded as its other gradients are, before it is added to others: so a sum does not
    depend on which slots a rank has, nor on where they are added up.
    """
    values = gradient._values()
    rows, places = gradient._indices()[0].unique(return_inverse=True)
    sums = torch.zeros(len(rows), *values.shape[1:], dtype=torch.float32).index_add_(0, places, values.float())
    return rows, sums.to(values.dtype)
