"""A pipeline schedule played with a clock: when each pass runs, how long ranks wait, and whether all get to the end.

    timeline = play(schedules.get("1f1b").all_ranks(4, 8), Cost(forward=1, input=1, weight=1))
    timeline.bubble                      # 9.0: what each rank waits, on average

A rank does its list in order and blocks before a pass until that pass's message is there. Messages are as slow as MPI
allows: a send is synchronous, so it is through only when the receiver has asked for it, which the receiver does no
earlier than right before the pass that needs it; a rank is done only when all its sends are through. A schedule that
ends here ends under every MPI, with no message ever buffered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mpilm.parallel.routes import Message, gives, needs
from mpilm.parallel.schedules import Action, Kind


class DeadlockError(Exception):
    """Ranks wait for each other; the message says which for what."""


@dataclass(frozen=True)
class Cost:
    """How long the passes take, in any unit; a whole backward pass is `input` + `weight`."""

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0

    def of(self, kind: Kind) -> float:
        """Of one pass."""
        return {Kind.FORWARD: self.forward, Kind.BACKWARD: self.input + self.weight, Kind.INPUT: self.input,
                Kind.WEIGHT: self.weight}[kind]


@dataclass(frozen=True)
class Timeline:
    """What happened: for every rank (start, end, action), in order."""

    ranks: list[list[tuple[float, float, Action]]]

    @property
    def end(self) -> float:
        """When the last rank was done."""
        return max((end for rank in self.ranks for _, end, _ in rank), default=0.0)

    @property
    def bubble(self) -> float:
        """Time of a rank in which it computed nothing, mean over ranks."""
        return self.end - sum(end - start for rank in self.ranks for start, end, _ in rank) / len(self.ranks)

    def in_flight(self, rank: int) -> int:
        """Most micro-batches (counted for each chunk) whose activations a rank holds at a time."""
        held, most = 0, 0
        split = any(action.kind is Kind.WEIGHT for _, _, action in self.ranks[rank])
        for _, _, action in self.ranks[rank]:
            held += action.kind is Kind.FORWARD
            most = max(most, held)
            held -= action.kind is (Kind.WEIGHT if split else Kind.BACKWARD)
        return most


def play(lists: Sequence[Sequence[Action]], cost: Cost, *, chunks: int = 1) -> Timeline:
    """Run the lists of all ranks.

    Raises:
        DeadlockError: They do not all come to their end.
    """
    ranks = len(lists)
    stages = ranks * chunks
    sent: dict[Message, float] = {}
    asked: set[Message] = set()
    done: list[list[tuple[float, float, Action]]] = [[] for _ in lists]
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            while len(done[rank]) < len(actions):
                action = actions[len(done[rank])]
                message = needs(action, rank, ranks, stages)
                if message is not None and message not in sent:
                    break
                start = max(done[rank][-1][1] if done[rank] else 0.0, sent.get(message, 0.0) if message else 0.0)
                end = start + cost.of(action.kind)
                done[rank].append((start, end, action))
                if message is not None:
                    asked.add(message)
                if (given := gives(action, rank, ranks, stages)) is not None:
                    sent[given] = end
                moved = True
    _require_end(lists, done, unanswered=set(sent) - asked)
    return Timeline(done)


def _require_end(lists: Sequence[Sequence[Action]], done: list[list[tuple[float, float, Action]]], *,
                 unanswered: set[Message]) -> None:
    both = enumerate(zip(lists, done, strict=True))
    stuck = [f"rank {rank} at {actions[len(past)]}" for rank, (actions, past) in both if len(past) < len(actions)]
    if stuck:
        raise DeadlockError(f"nobody gets on: {', '.join(stuck)}")
    if unanswered:
        raise DeadlockError(f"nobody receives {sorted((kind.value, *rest) for kind, *rest in unanswered)}")


def ascending(actions: Sequence[Action]) -> bool:
    """Within a chunk every kind of pass takes the micro-batches in order."""
    streams: dict[tuple[Kind, int], list[int]] = {}
    for action in actions:
        streams.setdefault((action.kind, action.chunk), []).append(action.micro_batch)
    return all(low < high for stream in streams.values() for low, high in pairwise(stream))
