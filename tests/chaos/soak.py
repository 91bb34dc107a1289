"""One job, a kill every so often, spares stepping in: nothing piles up in those who live through all of it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.jobs import SECONDS, Job
from tests.chaos.kills import Trial

ACTIVE = 3
START_S = 10.0      # of each rank, where there are more of them than cores
PAUSE_S = 1.0       # after somebody went on; allocations of the first steps are over then
ALLOWED_MIB = 24    # of growth: arenas of malloc come and go


@dataclass(frozen=True)
class Held:
    """What a process has at a moment."""

    mib: float
    files: int
    threads: int
    shared: int     # files that it has mapped and shares; those of /dev/shm are of all jobs of the host

    def __str__(self) -> str:
        return f"{self.mib:.0f} MiB, {self.files} files, {self.threads} threads, {self.shared} shared blocks"


def soak(kills: int, draw: random.Random, data: Path, folder: Path, *, every_s: float = PAUSE_S) -> Iterator[Trial]:
    """As many kills in one job, `every_s` seconds apart. The last trial is about what piled up."""
    directory = folder / "soak"
    options = {"run.spares": kills, "run.steps": 10**6, "checkpoint.every": 200, "log.validate_every": 0,
               "log.every": 5}
    with Job(ACTIVE + kills, data, directory, ulfm=True, **options) as job:
        job.until_step(2, SECONDS + START_S * (ACTIVE + kills))     # one core may start many of them
        ranks = job.ranks()
        living = [rank for rank in sorted(ranks) if rank in ranks]
        keeper = living[1]      # trains from beginning to end
        seen = [held(ranks[keeper])]
        for number in range(kills):
            victim = draw.choice([rank for rank in living[:ACTIVE] if rank != keeper])
            os.kill(ranks[victim], 9)
            living.remove(victim)
            on = job.until(lambda wanted=number + 1: job.words.read_text(errors="replace").count("went on") >= wanted)
            time.sleep(max(PAUSE_S, every_s))
            seen.append(held(ranks[keeper]))
            yield Trial(f"killed rank {victim}; rank {keeper} has {seen[-1]}", "" if on else f"stuck: {job.words}")
            if not on:
                return
    # In the first third the keeper may become the first of all ranks, who has some more files open.
    early, late = seen[max(min(2, kills), kills // 3)], seen[-1]
    grown = (late.mib - early.mib > ALLOWED_MIB or late.files > early.files or late.threads > early.threads
             or late.shared > early.shared)
    yield Trial(f"from {early} to {late}", "something piles up" if grown else "")


def held(pid: int) -> Held:
    """Of a process of this host."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    maps = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    shared = {(device, inode) for _, access, _, device, inode, *_ in maps if access.endswith("s")}
    return Held(int(status["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]),
                len(shared))
