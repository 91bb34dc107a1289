"""Bytes of what a rank holds at all times: weights, masters, optimizer states, gradients. Arithmetic only, no torch.

    division = Division(replicas=4, level=1)
    held = memory.held(shape, [range(0, 4)], division)      # embedding and three blocks
    held.optimizer                                          # 8 bytes for a quarter of the parameters

What passes keep and need comes on top: model/activations.py. parallel/footprint.py puts both together for any layout.

A parameter starts at a multiple of BLOCK elements, and what is divided is cut between blocks: figures are those of the
rank that holds most. Where replicas share memory in a node, each counts its part of the one copy (sync/_buckets.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from math import prod

from mpilm.model.shape import Shape

BLOCK = 16384           # elements, as in comm/order.py
FLOAT = 4
STATES = 2              # of AdamW
NUM_ROOMS = 2           # gradients under way at full length, from level 2 on

Units = Sequence[range]     # those of every chunk of a rank


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank.

    Args:
        weights: What the model computes with.
        masters: Float32 weights, where they are not the same memory.
        optimizer: Its states.
        gradients: Sums over micro-batches, and what is on its way to other ranks.
        activations: What forward passes leave for the backward passes of all micro-batches on their way.
        workspace: What a pass needs while it runs.
        gaps: In the allocator's heap, between what comes and goes.
        messages: Buffers of what ranks tell each other.
    """

    weights: int = 0
    masters: int = 0
    optimizer: int = 0
    gradients: int = 0
    activations: int = 0
    workspace: int = 0
    gaps: int = 0
    messages: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))


@dataclass(frozen=True)
class Division:
    """How replicas, the ranks that hold the same parameters, divide memory.

    Args:
        replicas: Their number.
        sharing: So many of them have one copy of whole weights, in memory of their node.
        level: What else is divided: 0 nothing, 1 optimizer states and masters, 2 gradients, 3 weights.
        tp: Ranks that share every layer: a parameter is a tp-th of the model's.
        element: Bytes of an element of the weights.
        num_slots: Micro-batches of a rank in a step.
        reproducible: They are summed along a tree.
        gradient: Bytes of an element of gradients, at level 0.
    """

    replicas: int = 1
    sharing: int = 1
    level: int = 0
    tp: int = 1
    element: int = 2
    num_slots: int = 1
    reproducible: bool = False
    gradient: int = FLOAT

    @property
    def buffers(self) -> int:
        """Gradients that the sum over micro-batches has at a time (sync/_slots.py)."""
        return max(1, (self.num_slots - 1).bit_length()) if self.reproducible else 1


def held(shape: Shape, units: Units, division: Division) -> Memory:
    """What a rank with these units holds at all times; level 3 counts the weights that are there at once."""
    how, count = division, _Count(shape, units, division)
    states, apart = STATES * FLOAT, FLOAT * (how.element != FLOAT)
    if how.level == 0:
        whole = count.whole(how.sharing)
        return Memory(_part(how.element * whole, how.sharing), _part(apart * whole, how.sharing),
                      _part(states * whole, how.sharing), how.gradient * whole * how.buffers)
    whole, mine = count.whole(how.replicas), count.mine()
    gradients = FLOAT * (whole if how.level == 1 else mine) * how.buffers + count.rooms() * FLOAT
    if how.level == 3 and how.sharing < how.replicas:
        return Memory(how.element * count.two_modules(), FLOAT * mine, states * mine, gradients)
    return Memory(_part(how.element * whole, how.sharing), apart * mine, states * mine, gradients)


def parameters(shape: Shape, units: Units, tp: int = 1) -> dict[str, int]:
    """Name -> elements of every parameter that a rank with these units holds, of `tp` that share them."""
    mine = {unit for run in units for unit in run}
    return {name: prod(dimensions) // (tp if len(dimensions) > 1 else 1)
            for name, dimensions in shape.parameters().items() if _unit(name, shape) in mine}


def largest_tensor(shape: Shape, units: Units) -> int:
    """Elements, at full size, of the largest tensor that a rank with these units has something of."""
    return max(prod(dimensions) for name in parameters(shape, units) for dimensions in shape.parts(name).values())


def _unit(name: str, shape: Shape) -> int:
    first, _, rest = name.partition(".")
    return {"embed_tokens": 0, "layers": 1 + int(rest.partition(".")[0] if first == "layers" else 0)}.get(
        first, shape.units - 1)


class _Count:
    """Elements, padded to blocks: in buckets of decayed and of other parameters, from level 2 on by modules."""

    def __init__(self, shape: Shape, units: Units, division: Division) -> None:
        self.level, self.replicas = division.level, division.replicas
        names = parameters(shape, units, division.tp)
        matrices = {name for name, dimensions in shape.parameters().items() if len(dimensions) > 1}
        padded = {name: -(-count // BLOCK) * BLOCK for name, count in names.items()}
        key = _module if division.level > 1 else matrices.__contains__
        self.buckets = _sums((key(name), count) for name, count in padded.items())

    def whole(self, owners: int) -> int:
        """A bucket has a block for each of its owners."""
        return sum(max(bucket, owners * BLOCK) for bucket in self.buckets)

    def mine(self) -> int:
        """Of the replica that has most."""
        return sum(-(-max(bucket // BLOCK, self.replicas) // self.replicas) * BLOCK for bucket in self.buckets)

    def rooms(self) -> int:
        """Modules take turns in them, from the last one on."""
        turns = [self.buckets[::-1][first::NUM_ROOMS] for first in range(NUM_ROOMS)] if self.level > 1 else []
        return sum(max(*turn, self.replicas * BLOCK) for turn in turns if turn)

    def two_modules(self) -> int:
        """The one that computes and the next one."""
        return max(map(sum, pairwise([0, *self.buckets])))


def _module(name: str) -> str:
    """As sync/_layout.py has it."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if second.isdecimal() else first


def _sums(pairs: Iterable[tuple[object, int]]) -> list[int]:
    sums: dict[object, int] = {}
    for key, count in pairs:
        sums[key] = sums.get(key, 0) + count
    return list(sums.values())


def _part(nbytes: int, of: int) -> int:
    return -(-nbytes // of)
