"""Which checkpoints a directory has, which stay, and what killed jobs left behind. One rank calls this.

    step-00000100             complete
    .step-00000200.partial    being written; after a kill: removed at the next start
    .step-00000100.replaced   the old one while a new one of the same step takes its name; good until that has happened
    .step-00000100.removed    being removed; after a kill: removed at the next start; the next of it is .removed-2
    step-00000300.abandoned   the run went back to before this step and went on from there; stays, and the next of
                              this step is called .abandoned-2

A directory is renamed before it is removed, so that no kill leaves half of one under a good name, and what a file
system does not let go (NFS, while somebody has a file open) is in nobody's way.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

COMPLETE = re.compile(r"step-(\d{8,18})")
REPLACED = re.compile(r"\.(step-\d{8,18})\.replaced")
LEFTOVER = re.compile(r"\.(step-\d{8,18})\.(partial|removed(-\d+)?)")


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


def tidy(directory: Path) -> tuple[list[str], list[OSError]]:
    """Remove what killed jobs left behind; what was removed, and why others were not."""
    removed, kept = [], []
    for entry in _listed(directory):
        match = REPLACED.fullmatch(entry)
        obsolete = match is not None and (directory / match[1]).exists()
        if obsolete or LEFTOVER.fullmatch(entry):
            try:
                remove(directory / entry)
                removed.append(entry)
            except OSError as error:
                kept.append(error)
    return removed, kept


def remove(path: Path) -> None:
    """Remove a checkpoint, or part of one; afterwards it does not have its name any more, whatever is left.

    Raises:
        OSError: Something is left, or it could not even be renamed.
    """
    step = COMPLETE.search(path.name)
    assert step is not None, f"{path} is no checkpoint"
    aside = _unused(path.parent / f".{step[0]}.removed")
    os.rename(path, aside)
    try:
        shutil.rmtree(aside)
    except OSError as error:
        error.filename = str(aside)     # it would be a name within
        raise


def publish(directory: Path, step: int) -> None:
    """Give a partial directory its name, for good: afterwards a power cut can't undo it."""
    target, aside = directory / name(step), directory / f".{name(step)}.replaced"
    sync(directory / partial(step))
    if target.exists():
        _try_to_remove(aside)
        os.rename(target, aside)
    os.rename(directory / partial(step), target)
    sync(directory)
    _try_to_remove(aside)


class Kept(NamedTuple):
    """Which checkpoints stay: so many of the newest, the multiples of a step (0: none), and one step (-1: none)."""

    last: int
    every: int = 0
    spared: int = -1


def prune(directory: Path, step: int, kept: Kept) -> list[str]:
    """After `step` has become complete: set aside what is newer, remove what need not stay; what to tell about it."""
    found = complete(directory)
    abandoned = {other: abandon(directory, other, found[other]) for other in found if other > step}
    for other in expired([other for other in found if other <= step], kept):
        remove(found[other])
    return [f"{directory / name(other)} is from before the run went back to an earlier step; "
            f"it is now called {path.name}." for other, path in abandoned.items()]


def abandon(directory: Path, step: int, path: Path) -> Path:
    """Give the checkpoint of a step at `path` a name under which no run goes on from it; the new path."""
    target = _unused(directory / f"{name(step)}.abandoned")
    os.rename(path, target)
    return target


def expired(steps: Iterable[int], kept: Kept) -> list[int]:
    """Which of these steps need not stay."""
    older = sorted(steps)[:-kept.last]
    return [step for step in older if step != kept.spared and not (kept.every and step % kept.every == 0)]


def sync(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _try_to_remove(path: Path) -> None:
    """What is left of it the next start removes."""
    if path.exists():
        with suppress(OSError):
            remove(path)


def _unused(path: Path) -> Path:
    """This name, or the first of it with a number that nobody has."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def _listed(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
