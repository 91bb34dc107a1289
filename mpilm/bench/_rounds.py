"""Contenders in interleaved rounds, as many at a time as memory holds, and what the rounds say.

    results = compete(case, [who, ...], cores=(0, 1), size=2, plan=Plan(rounds=5, steps=4))
    results.ratio("mpilm", "ddp")        # median over the rounds that both were in

A round runs every contender for a few steps, in an order that rotates; so a machine that drifts is the same to all.
Where memory does not hold all of them they come in groups. Ours and ddp are anchors, in every group: their ratios to
anyone are always of the same rounds.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from mpilm.bench import _memory
from mpilm.bench._contenders import OURS, Case, Who
from mpilm.bench._jobs import Job, JobError
from mpilm.log import warn

REFERENCE = "ddp"
WARMUP_STEPS = 3  # the first of them compiles
MEMORY_STEPS = 2
SETTLE_STEPS = 1  # of every turn, before the clock runs: caches are another contender's
ROOM = 1.5  # times what the largest contender took must be free for the next one
RESERVE = 2**30


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    rounds: int
    steps: int


@dataclass
class Results:
    """Tokens/s of every contender in every round, and bytes of its largest process."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    peak_pss: dict[str, int] = field(default_factory=dict)
    max_rss: dict[str, int] = field(default_factory=dict)
    told: dict[str, list[list[dict[str, float]]]] = field(default_factory=dict)  # of every round, of every process
    num_groups: int = 0

    def names(self) -> list[str]:
        """Who was measured."""
        return list(dict.fromkeys(name for seen in self.rounds for name in seen))

    def median(self, name: str) -> float:
        """Tokens/s over all ranks."""
        return statistics.median(seen[name] for seen in self.rounds if name in seen)

    def ratios(self, name: str, to: str) -> list[float]:
        """Of every round that both were in."""
        return [seen[name] / seen[to] for seen in self.rounds if name in seen and to in seen]

    def ratio(self, name: str, to: str, *, by: str) -> float:
        """The median of `ratios`; for two that never met, by way of `by`, which met both."""
        if met := self.ratios(name, to):
            return statistics.median(met)
        first, second = self.ratios(name, by), self.ratios(to, by)
        return statistics.median(first) / statistics.median(second) if first and second else math.nan


def compete(case: Case, whos: Sequence[Who], *, cores: Sequence[int], size: int, plan: Plan) -> Results:
    """Measure contenders on one case. A contender that fails is named and left out."""
    anchors, others = [who for who in whos if _anchor(who, whos)], [who for who in whos if not _anchor(who, whos)]
    results = Results()
    with ExitStack() as resident:
        field_ = _Field(case, tuple(cores), size, results)
        first = [job for who in anchors if (job := field_.start(who, resident))]
        while results.num_groups == 0 or others:
            with ExitStack() as group:
                jobs = list(first)
                while others and (len(jobs) == len(first) or field_.has_room()):
                    job = field_.start(others.pop(0), group)
                    jobs += [job] if job else []
                results.num_groups += 1
                alive = _rounds(jobs, plan, results)
                first = [job for job in first if job in alive]
    return results


def reference(names: Sequence[str]) -> str:
    """Whom all others are divided by: ddp, else the first peer, else the first of all."""
    peers = [name for name in names if not name.startswith(OURS)]
    return REFERENCE if REFERENCE in names else [*peers, *names][0]


def _anchor(who: Who, whos: Sequence[Who]) -> bool:
    return who.ours or who.name == reference([one.name for one in whos])


@dataclass
class _Field:
    """Starts contenders and remembers what they took."""

    case: Case
    cores: tuple[int, ...]
    size: int
    results: Results
    largest: int = 0

    def start(self, who: Who, stack: ExitStack) -> Job | None:
        """A job that is warm, its memory measured; closed with `stack`."""
        progress(f"{self.case.name}: starting {who.name}")
        try:
            job = stack.enter_context(Job(who, self.case, cores=self.cores, size=self.size))
            job.run(WARMUP_STEPS)
            peak = job.peak_memory(MEMORY_STEPS)
        except JobError as error:
            warn(str(error))
            return None
        self.results.peak_pss[who.name] = peak
        self.largest = max(self.largest, peak * job.size)
        return job

    def has_room(self) -> bool:
        """Whether memory holds another contender."""
        return _memory.available() > ROOM * self.largest + RESERVE


def _rounds(jobs: list[Job], plan: Plan, results: Results) -> list[Job]:
    """Returns those who came to the end."""
    for turn in range(plan.rounds):
        seen: dict[str, float] = {}
        for place in range(len(jobs)):
            job = jobs[(place + turn) % len(jobs)]
            try:
                job.run(SETTLE_STEPS)
                seen[job.who.name] = job.case.tokens * plan.steps / job.run(plan.steps)
                results.max_rss[job.who.name] = job.max_rss
                results.told.setdefault(job.who.name, []).append(job.told)
            except JobError as error:
                warn(str(error))
                jobs = [other for other in jobs if other is not job]
                break
        results.rounds.append(seen)
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in seen.items())
        progress(f"group {results.num_groups}, round {turn + 1} of {plan.rounds}, tokens/s: {rates}")
    return jobs


def progress(text: str) -> None:
    """To stderr: stdout may be --json's."""
    print(text, file=sys.stderr, flush=True)
