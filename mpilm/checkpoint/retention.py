"""Which checkpoints a directory has, which stay, and what killed jobs left behind. One rank calls this.

    step-00000100             complete
    .step-00000200.partial    being written; after a kill: removed at the next start
    .step-00000100.replaced   the old one while a new one of the same step takes its name; good until that has happened
    .step-00000100.removed    being removed; after a kill: removed at the next start
    step-00000300.abandoned   the run went back to before this step and went on from there; stays, and the next of
                              this step is called .abandoned-2

A directory is renamed before it is removed, so that no kill leaves half of one under a good name.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

COMPLETE = re.compile(r"step-(\d{8,18})")
REPLACED = re.compile(r"\.(step-\d{8,18})\.replaced")
LEFTOVER = re.compile(r"\.step-\d{8,18}\.(partial|removed)")


def name(step: int) -> str:
    """The directory of a complete checkpoint."""
    return f"step-{step:08d}"


def partial(step: int) -> str:
    """The directory while it is being written."""
    return f".{name(step)}.partial"


def complete(directory: Path) -> dict[int, Path]:
    """Complete checkpoints by step, newest first. One that is just being replaced counts. Changes nothing."""
    found: dict[int, Path] = {}
    for entry in _listed(directory):
        if match := COMPLETE.fullmatch(entry):
            found[int(match[1])] = directory / entry
        elif (match := REPLACED.fullmatch(entry)) and not (directory / match[1]).exists():
            found[int(match[1].removeprefix("step-"))] = directory / entry
    return dict(sorted(found.items(), reverse=True))


def tidy(directory: Path) -> list[str]:
    """Remove what killed jobs left behind; what was removed."""
    removed = []
    for entry in _listed(directory):
        match = REPLACED.fullmatch(entry)
        obsolete = match is not None and (directory / match[1]).exists()
        if obsolete or LEFTOVER.fullmatch(entry):
            shutil.rmtree(directory / entry)
            removed.append(entry)
    return removed


def publish(directory: Path, step: int) -> None:
    """Give a partial directory its name, for good: afterwards a power cut can't undo it."""
    target, aside = directory / name(step), directory / f".{name(step)}.replaced"
    sync(directory / partial(step))
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
    os.rename(directory / partial(step), target)
    sync(directory)
    if aside.exists():
        shutil.rmtree(aside)


def prune(directory: Path, step: int, *, keep_last: int, keep_every: int) -> list[str]:
    """After `step` has become complete: set aside what is newer, remove what need not stay; what to tell about it."""
    found = complete(directory)
    abandoned = {other: abandon(directory, other, found[other]) for other in found if other > step}
    for other in expired([other for other in found if other <= step], keep_last=keep_last, keep_every=keep_every):
        _remove(found[other], other)
    return [f"{directory / name(other)} is from before the run went back to an earlier step; "
            f"it is now called {path.name}." for other, path in abandoned.items()]


def abandon(directory: Path, step: int, path: Path) -> Path:
    """Give the checkpoint of a step at `path` a name under which no run goes on from it; the new path."""
    target, number = directory / f"{name(step)}.abandoned", 1
    while target.exists():
        number += 1
        target = directory / f"{name(step)}.abandoned-{number}"
    os.rename(path, target)
    return target


def expired(steps: Iterable[int], *, keep_last: int, keep_every: int) -> list[int]:
    """Which of these steps need not stay: not the newest `keep_last`, not multiples of `keep_every` (0: none)."""
    older = sorted(steps)[:-keep_last]
    return [step for step in older if not (keep_every and step % keep_every == 0)]


def sync(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove(path: Path, step: int) -> None:
    aside = path.parent / f".{name(step)}.removed"
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(path, aside)
    shutil.rmtree(aside)


def _listed(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
