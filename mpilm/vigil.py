"""What is made of heartbeats: who is missing, who is slow, whether the job hangs. Arithmetic, no MPI.

    vigil.hear(3, Beat(step=41, passes=328, doing="computing", for_s=0.2, part=0, compute_s=0.21))
    vigil.hangs(), vigil.missing(), vigil.stragglers(), vigil.report({3: "stack of rank 3"}, missing=[1])
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median_low
from typing import NamedTuple

SURE = 3        # beats in a row in which a rank must be slow, each of another step


class Beat(NamedTuple):
    """Where a rank is: its step, passes and bytes of files so far, what it is doing and for how long, its part of the
    model, what its own work of a step takes, and how many times the usual time it may take for what it is doing."""

    step: int
    passes: int
    doing: str
    for_s: float
    part: int
    compute_s: float
    patience: int = 1

    def to_text(self) -> str:
        """For a message."""
        return json.dumps(self)

    @classmethod
    def from_text(cls, text: str) -> Beat:
        """What `to_text` made."""
        return cls(*json.loads(text))


class Vigil:
    """Over so many ranks.

    Args:
        timeout_s: Without progress of anybody, or without a beat of one of them.
        slow: A rank is a straggler when its work takes so many times the median of those with the same work.
        watched: Those whose silence counts; None: all of them.
        clock: Seconds.

    Attributes:
        lagging: Straggler -> how many times the median.
    """

    def __init__(self, size: int, *, timeout_s: float, slow: float, watched: Iterable[int] | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.size, self.timeout_s, self.slow, self.clock = size, timeout_s, slow, clock
        self.watched = range(size) if watched is None else sorted(watched)
        self.beats: list[Beat | None] = [None] * size
        self.restart()
        self.counts = [0] * size    # of beats in a row in which it was slow
        self.lagging: dict[int, float] = {}

    def restart(self) -> None:
        """Wait as long as at the beginning for everybody: what was not heard says nothing."""
        self.heard = [self.clock()] * self.size
        self.moved = self.clock()   # when a rank was last heard to have got further

    def hear(self, rank: int, beat: Beat) -> None:
        """A beat has come."""
        before, self.beats[rank], self.heard[rank] = self.beats[rank], beat, self.clock()
        if before is None or beat[:3] != before[:3]:
            self.moved = self.clock()
        if before is None or beat.step != before.step:
            self._compare(rank, beat)

    def _compare(self, rank: int, beat: Beat) -> None:
        peers = [other.compute_s for other in self.beats if other and other.part == beat.part and other.compute_s > 0]
        ratio = beat.compute_s / median_low(peers) if len(peers) > 1 else 1.0
        self.counts[rank] = self.counts[rank] + 1 if ratio > self.slow else 0
        if not self.counts[rank]:
            self.lagging.pop(rank, None)
        elif self.counts[rank] >= SURE and rank in self.lagging:
            self.lagging[rank] = ratio

    def stragglers(self) -> list[str]:
        """Those who have become stragglers since the last time, in words."""
        found = []
        for rank, count in enumerate(self.counts):
            beat = self.beats[rank]
            if count < SURE or rank in self.lagging or beat is None:
                continue
            peers = [other.compute_s for other in self.beats if other and other.part == beat.part and other.compute_s]
            self.lagging[rank] = beat.compute_s / median_low(peers)
            found.append(f"step {beat.step}: rank {rank} is a straggler: its own work of a step takes "
                         f"{beat.compute_s:.3g} s, {self.lagging[rank]:.1f} times the median.")
        return found

    def missing(self) -> list[int]:
        """Ranks that do not beat. A beat may be on its way, so a little before the time."""
        return [rank for rank in self.watched if self.silence(rank) > 0.8 * self.timeout_s]

    def silence(self, rank: int) -> float:
        """Seconds since it was last heard of."""
        return self.clock() - self.heard[rank]

    def hangs(self) -> bool:
        """Whether the job has to be ended."""
        patience = max((beat.patience for beat in self.beats if beat), default=1)
        return bool(self.missing()) or self.clock() - self.moved > patience * self.timeout_s

    def report(self, stacks: Mapping[int, str], missing: Sequence[int]) -> str:
        """Who is missing, where everyone is, and the stacks of those who told them."""
        waited = self.clock() - self.moved
        who = (f"rank {', '.join(map(str, missing))} does not answer (stopped, or its node is gone)" if missing
               else "every rank answers")
        lines = [f"error: the job hangs: no progress for {waited:.1f} s; {who}."]
        for rank, beat in enumerate(self.beats):
            place = f"step {beat.step}, {beat.doing}, for {beat.for_s:.1f} s" if beat else "never heard of"
            lines.append(f"rank {rank}: {place}{'   <- missing' if rank in missing else ''}")
        for rank, text in sorted(stacks.items()):
            lines.append(f"\nrank {rank} {text.rstrip()}")
        return "\n".join(lines) + "\n"
