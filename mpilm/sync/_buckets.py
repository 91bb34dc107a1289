"""Flat memory for parameters, gradients and optimizer state, bucket by bucket.

    gradients   float32, see _gradients.py; or those of every rank, in the dtype of the weights (_unsummed.py)
    masters, optimizer states   float32; each rank updates a segment of its own
    weights     what the model computes with (bf16, or the masters themselves)
    blocks      float64, the sum of squares of every BLOCK gradients, for the global norm

A `Replica` is a bucket whose memory the collective's owners share: the ranks of a node, or each rank alone with a copy
of everything. A `Shard` is one that is divided over all ranks: of masters and states a rank has its segment only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from mpilm import bridge
from mpilm.comm.arrays import put
from mpilm.comm.collectives import nothing_more
from mpilm.comm.devices import HOST, Array, Device
from mpilm.comm.node import Node
from mpilm.comm.order import BLOCK, segments
from mpilm.flat import Flat
from mpilm.sync import _squares
from mpilm.sync._gradients import Gradients, Reduce, Summed, Whole
from mpilm.sync._layout import Layout
from mpilm.sync._slots import Visit
from mpilm.sync._unsummed import Unsummed
from mpilm.sync._weights import Weights

MASTERS = "model"
# (state name or MASTERS, parameter name, first element, number of elements) -> float32 values
Read = Callable[[str, str, int, int], np.ndarray]
# (state name or MASTERS, parameter name, first element, values)
Run = tuple[str, str, int, Array]


class Leaving(Protocol):
    """A bucket whose gradients leave when they are all there.

    Attributes:
        flat: Whole, what parameters are views of.
    """

    layout: Layout
    flat: torch.Tensor
    gradients: Gradients

    def depart(self, slot: int, *, last: bool) -> Callable[[], None]:
        """The gradients of `slot` are all there; returns what is to be done in bucket order, on all ranks alike."""


class Segment:
    """The segment `own` of a bucket, which this rank updates.

    Args:
        repeated: Parameters that the norm must not count here, because another rank holds and counts them too.
        device: Of all of its memory.
        compiled: The update is, and so are sums of squares.

    Attributes:
        shard: What the update writes the new weights to.
        masters, states: float32.
        squares: float64, one for every BLOCK of the gradients.
        gradients: What was summed.
    """

    shard: torch.Tensor
    masters: torch.Tensor
    states: Mapping[str, Array]
    squares: Array
    gradients: Summed

    def __init__(self, layout: Layout, own: slice, repeated: Collection[str] = (), device: Device = HOST, *,
                 compiled: bool = False) -> None:
        self.layout, self.own = layout, own
        self.squared = _squares.by(device, compiled=compiled)
        self.left_out = [slice((start - own.start) // BLOCK, -(-(stop - own.start) // BLOCK))
                         for member, start, stop in layout.members_in(own) if member.name in repeated]

    def square(self, part: slice) -> None:
        """Sums of squares of those of my gradients' blocks that a part of the bucket has."""
        part = slice(max(part.start, self.own.start) - self.own.start, min(part.stop, self.own.stop) - self.own.start)
        if part.start < part.stop:
            assert part.start % BLOCK == part.stop % BLOCK == 0, f"{part} is not cut between blocks"
            blocks = slice(part.start // BLOCK, part.stop // BLOCK)
            self.squared(self.gradients, part, self.squares[blocks])
            for run in self.left_out:
                self.squares[max(run.start, blocks.start):min(run.stop, blocks.stop)] = 0

    def square_late(self) -> None:
        """Of all of my segment, if that was not done while it was summed."""
        if self.squared.late:
            self.square(self.own)

    def flats(self) -> Iterator[Flat]:
        """My segment, as the update takes it."""
        return flats_of(self.layout, self.own, self.masters, self.shard, self.gradients.addends, self.states.values())

    def arrays(self) -> dict[str, Array]:
        """Everything a resume needs of my segment, float32, by the name of the state."""
        return {MASTERS: bridge.array(self.masters), **self.states}

    def load(self, read: Read) -> None:
        """Fill my segment of masters and optimizer state, and round the weights from the masters."""
        for name, array in self.arrays().items():
            self.fill(array, name, read)
        self.round()

    def fill(self, array: Array, name: str, read: Read) -> None:
        """Fill an array that is as long as my segment with the state `name`."""
        for member, start, stop in self.layout.members_in(self.own):
            put(read(name, member.name, start - member.start, stop - start),
                array[start - self.own.start:stop - self.own.start])

    def round(self) -> None:
        """Make my segment of the weights what the masters say."""
        if self.shard.data_ptr() != self.masters.data_ptr():
            self.shard.copy_(self.masters)

    def own_runs(self) -> list[Run]:
        """Everything a resume needs of my segment."""
        return runs_of(self.layout, self.own, self.arrays())


def runs_of(layout: Layout, share: slice, arrays: Mapping[str, Array]) -> list[Run]:
    """The runs of all members in `share` of a bucket, of which `arrays` have the values."""
    return [(name, member.name, start - member.start, array[start - share.start:stop - share.start])
            for name, array in arrays.items() for member, start, stop in layout.members_in(share)]


def flats_of(layout: Layout, own: slice, masters: torch.Tensor, weights: torch.Tensor,
             gradients: Sequence[torch.Tensor], states: Iterable[Array]) -> Iterator[Flat]:
    """The segment `own` of a bucket, as the update takes it; everything is as long as the segment."""
    for zone, decay in layout.zones(own):
        part = slice(zone.start - own.start, zone.stop - own.start)
        yield Flat(masters[part], weights[part], tuple(gradient[part] for gradient in gradients),
                   tuple(bridge.tensor(state[part], torch.float32) for state in states), decay)


class Bucket(Segment):
    """What `Replica` and `Shard` have in common: `shard` is the segment of `flat`, which is whole."""

    flat: torch.Tensor
    gradients: Gradients

    def __init__(self, layout: Layout, own: slice, gradients: Gradients, repeated: Collection[str],
                 device: Device = HOST, *, compiled: bool = False) -> None:
        super().__init__(layout, own, repeated, device, compiled=compiled)
        self.gradients = gradients

    def depart(self, slot: int, *, last: bool) -> Callable[[], None]:
        """As Leaving."""
        return partial(self.gradients.depart(slot), self.square if last and not self.squared.late else nothing_more)


class Replica(Bucket):
    """A bucket among `owners`. Collective over the collective's communicator.

    Args:
        blocks: float64, one for every BLOCK of its gradients, for all owners.
        unsummed: Builds gradients that are not summed, where they may be.
    """

    def __init__(self, layout: Layout, collective: Any, reduce: Reduce, owners: Node, blocks: Array, *,
                 states: Sequence[str], dtype: torch.dtype, visits: Sequence[Visit], compiled: bool,
                 repeated: Collection[str], unsummed: Callable[[Layout, Any, slice], Unsummed | None] | None) -> None:
        count, self.cut = layout.count, segments(layout.count, owners.comm.size)
        device = collective.device
        own = self.cut[owners.comm.rank]
        gradients = (unsummed(layout, collective, own) if unsummed else None) or Whole(
            layout, collective.allocate, reduce, own, visits)
        super().__init__(layout, own, gradients, repeated, device, compiled=compiled)
        self.collective = collective
        self.common = {name: owners.allocate_common(count, np.float32, device) for name in (MASTERS, *states)}
        whole = bridge.tensor(self.common[MASTERS], torch.float32)
        self.flat = whole if dtype == torch.float32 else bridge.tensor(
            owners.allocate_common(count, bridge.array_dtype(dtype), device), dtype)
        self.masters, self.shard = whole[own], self.flat[own]
        self.states = {name: self.common[name][own] for name in states}
        self.squares = blocks[own.start // BLOCK:own.stop // BLOCK]

    def flats_of(self, owner: int) -> Iterator[Flat] | None:
        """Another owner's segment; None if its gradients are not where I see them."""
        mine = self.gradients
        gradients = self.collective.seen(mine.reduced, owner) if isinstance(mine, Whole) else None
        if gradients is None:
            return None
        own = self.cut[owner]
        states = [array[own] for name, array in self.common.items() if name != MASTERS]
        masters, summed = (bridge.tensor(array[own], torch.float32) for array in (self.common[MASTERS], gradients))
        return flats_of(self.layout, own, masters, self.flat[own], [summed], states)

    def runs(self, share: slice, *, first: int) -> list[Run]:
        """Everything a resume needs of the elements in `share`, among which mine are those from `first` on."""
        low, high = (min(max(0, end - first), self.layout.count) for end in (share.start, share.stop))
        own = slice(low, high)
        return runs_of(self.layout, own, {name: array[own] for name, array in self.common.items()})


class Shard(Bucket):
    """A bucket over all ranks, with any kind of gradients and weights."""

    def __init__(self, layout: Layout, own: slice, gradients: Gradients, weights: Weights, squares: Array, *,
                 states: Sequence[str], repeated: Collection[str], device: Device = HOST,
                 compiled: bool = False) -> None:
        super().__init__(layout, own, gradients, repeated, device, compiled=compiled)
        self.weights = weights
        self.flat, self.shard, self.masters = weights.flat, weights.shard, weights.masters
        self.states = {name: device.zeros(own.stop - own.start, np.float32) for name in states}
        self.squares = squares
