"""Pipeline schedules: what each rank does with which micro-batch, in which order. A schedule is data.

    schedules.get("1f1b").actions(0, 2, 4)        # rank 0 of 2, four micro-batches: F0 F1 B0 F2 B1 F3 B2 B3

F is a forward pass and B a backward pass. A split backward pass is I, the gradient of the input, which the stage before
waits for, and W, the gradient of the weights, which nobody waits for and which can fill a bubble.

A rank may hold several chunks of the model: chunk c of rank r is stage c * ranks + r, so activations go round the ranks
once for every chunk. On one rank every schedule is gradient accumulation.

Invariants, tested for every schedule: each micro-batch once forward and once backward through every chunk; within a
chunk, each kind of pass takes micro-batches in ascending order (gradients are summed in that order, and messages
between two stages need no other mark than their order); no rank ever waits for one that waits for it.

GPipe: arXiv 1811.06965. 1F1B (PipeDream-flush): 2006.09503. Interleaved: 2104.04473. Zero bubble (ZB-H1): 2401.10241.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from mpilm.log import UserError


class Kind(Enum):
    """What is computed: a forward pass, a whole backward pass, or one of its halves."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    WEIGHT = "W"


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch (a slot of this rank's, from 0) through one chunk of this rank."""

    kind: Kind
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")


# (rank, ranks, micro-batches, chunks a rank) -> what this rank does
Actions = Callable[[int, int, int, int], list[Action]]


def gpipe(rank: int, ranks: int, num_microbatches: int, chunks: int = 1) -> list[Action]:
    """All forward passes, then all backward passes: simple, and every activation is kept."""
    numbers = range(num_microbatches)
    return [Action(Kind.FORWARD, n) for n in numbers] + [Action(Kind.BACKWARD, n) for n in numbers]


def one_forward_one_backward(rank: int, ranks: int, num_microbatches: int, chunks: int = 1) -> list[Action]:
    """As few forward passes ahead as keep the ranks after it busy: `ranks - rank` micro-batches are kept at most."""
    return interleaved(rank, ranks, num_microbatches, 1)


def interleaved(rank: int, ranks: int, num_microbatches: int, chunks: int = 1) -> list[Action]:
    """1F1B over several chunks a rank: the bubble shrinks by their number, and messages grow by it.

    Micro-batches take turns in rounds: a round goes through the first chunk, then through the second, and so on.
    """
    forward = _rounds(Kind.FORWARD, range(chunks), ranks, num_microbatches)
    backward = _rounds(Kind.BACKWARD, range(chunks)[::-1], ranks, num_microbatches)
    ahead = ranks - rank - 1
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * _round_size(ranks, num_microbatches)
    return _alternate(forward, backward, ahead)


def zero_bubble(rank: int, ranks: int, num_microbatches: int, chunks: int = 1) -> list[Action]:
    """ZB-H1: as 1F1B, but the weight gradients stay `rank` micro-batches behind and fill the wait at the end."""
    actions: list[Action] = []
    done = 0
    for action in one_forward_one_backward(rank, ranks, num_microbatches):
        if action.kind is Kind.FORWARD:
            actions.append(action)
            continue
        actions.append(Action(Kind.INPUT, action.micro_batch))
        if action.micro_batch >= rank:
            actions.append(Action(Kind.WEIGHT, done))
            done += 1
    return actions + [Action(Kind.WEIGHT, n) for n in range(done, num_microbatches)]


def _alternate(forward: list[Action], backward: list[Action], ahead: int) -> list[Action]:
    """`ahead` forward passes (warm-up), then one forward and one backward (steady), then the rest (cool-down)."""
    ahead = min(ahead, len(forward))
    steady = len(forward) - ahead
    pairs = [action for pair in zip(forward[ahead:], backward, strict=False) for action in pair]
    return forward[:ahead] + pairs + backward[steady:]


def _round_size(ranks: int, num_microbatches: int) -> int:
    """Micro-batches of a round: the fewest, from `ranks` up, that divide their number."""
    return next((size for size in range(ranks, num_microbatches) if num_microbatches % size == 0), num_microbatches)


def _rounds(kind: Kind, chunks: range, ranks: int, num_microbatches: int) -> list[Action]:
    size = max(1, _round_size(ranks, num_microbatches))
    return [Action(kind, number, chunk) for start in range(0, num_microbatches, size)
            for chunk in chunks for number in range(start, start + size)]


@dataclass(frozen=True)
class Schedule:
    """An entry of the menu.

    Args:
        actions: The pure function that makes a rank's list.
        chunked: It makes use of several chunks a rank.
        split: Its backward passes are split in two.
    """

    actions: Actions
    chunked: bool = False
    split: bool = False

    def all_ranks(self, ranks: int, num_microbatches: int, chunks: int = 1) -> list[list[Action]]:
        """The list of every rank."""
        return [self.actions(rank, ranks, num_microbatches, chunks) for rank in range(ranks)]

    def forward(self, rank: int, ranks: int, num_microbatches: int, chunks: int = 1) -> Iterator[Action]:
        """The forward passes alone, in this schedule's order."""
        return (action for action in self.actions(rank, ranks, num_microbatches, chunks) if action.kind is Kind.FORWARD)


MENU = {"gpipe": Schedule(gpipe), "1f1b": Schedule(one_forward_one_backward),
        "interleaved": Schedule(interleaved, chunked=True), "zb": Schedule(zero_bubble, split=True)}


def get(name: str, *, option: str = "parallel.schedule") -> Schedule:
    """The schedule of that name, which was given as `option`.

    Raises:
        UserError: There is none; the message lists those there are.
    """
    if name not in MENU:
        raise UserError(f"--{option} {name}: there is no such choice; give one of {', '.join(MENU)}.")
    return MENU[name]
