"""Hurt runs at random and print a table: python -m tests.chaos [--trials N] [--seed S] [--campaign NAME ...]."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

from tests import datasets
from tests.chaos import files, hangs, kills, saves, soak, storage
from tests.chaos.kills import Trial

Campaign = Callable[[int, random.Random, Path, Path], Iterator[Trial]]
CAMPAIGNS: dict[str, Campaign] = {
    "kills-ulfm": kills.under_ulfm,
    "kills-restart": kills.with_restarts,
    "kills-saving": saves.killed,
    "damaged-files": files.damaged,
    "stopped-ranks": hangs.stopped,
    "suspended-jobs": hangs.suspended,
    "soak": soak.soak,
    "refused-writes": storage.refused,
}


def main() -> None:
    """Run the campaigns; the exit code is 0 if nothing went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--trials", type=int, default=18, help="of every campaign")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--campaign", nargs="+", choices=list(CAMPAIGNS), default=list(CAMPAIGNS))
    parser.add_argument("--every", type=float, default=soak.PAUSE_S, help="seconds between two kills of the soak")
    given = parser.parse_args()
    campaigns = CAMPAIGNS | {"soak": partial(soak.soak, every_s=given.every)}
    rows, failed = [], 0
    folder = Path(tempfile.mkdtemp(prefix="mpilm-chaos-"))
    data = datasets.small(folder / "data")
    for name in given.campaign:
        begun, trials = time.monotonic(), []
        for trial in campaigns[name](given.trials, random.Random(given.seed), data, folder):
            trials.append(trial)
            print(f"{name} {len(trials):4}  {trial.case}: {trial.problem or 'good'}"
                  + (f" ({trial.seconds:.2f} s)" if trial.seconds is not None else ""), flush=True)
        bad = sum(bool(trial.problem) for trial in trials)
        pauses = [trial.seconds for trial in trials if trial.seconds is not None]
        failed += bad
        rows.append(f"| {name} | {len(trials)} | {len(trials) - bad} | "
                    + (f"{median(pauses):.2f}, at most {max(pauses):.2f}" if pauses else "")
                    + f" | {(time.monotonic() - begun) / 60:.1f} |")
    print("\n| campaign | trials | good | seconds until it went on, or was named | minutes |\n|---|---|---|---|---|\n"
          + "\n".join(rows) + f"\n\nseed {given.seed}; what went wrong is left in {folder}")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
