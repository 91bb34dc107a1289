"""What a run began from when `--run.resume` is `never` or a path, so that the same command goes on with it.

    runs/demo/origin.json    {"command": {"resume": "/data/runs/a/checkpoints/step-00000600", "seed": 1, ...},
                              "checkpoint": "/data/runs/a/checkpoints/step-00000600"}

Whoever begins first puts aside, under names that nobody resumes from, the checkpoints that are no part of the run that
begins, and their metrics; nothing is removed. Then this file is written, and from then on all checkpoints of the run
directory belong to that run: come from its origin, or lead to it. A kill on the way leaves the file unwritten, and the
next one goes on with putting aside. All of it is called by one rank.
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from mpilm.checkpoint import Reader, retention
from mpilm.config import Config
from mpilm.data._files import write_json
from mpilm.log import say
from mpilm.metrics import FILE as METRICS
from mpilm.named import named

FILE, CHECKPOINTS = "origin.json", "checkpoints"
# Sections that say what is learned: with others it is another command. How long, where and by whom is not in them.
LEARNED = ("data", "model", "optim")


class Origin(NamedTuple):
    """What a run began from: this checkpoint, or nothing."""

    checkpoint: Path | None


def path(config: Config) -> Path:
    """Where it is written."""
    return Path(config.run.dir) / FILE


def read(config: Config) -> Origin | None:
    """What this command has begun from; None if it has not begun yet, or another one has since.

    Raises:
        OSError: The file is there, but can't be read.
    """
    try:
        with named(path(config)):
            found = json.loads(path(config).read_bytes())
        checkpoint = found["checkpoint"]
        same = found["command"] == _command(config)
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):   # it is as good as not there
        return None
    return Origin(checkpoint and Path(checkpoint)) if same else None


def begin(config: Config, reader: Reader | None) -> None:
    """Make sure that the checkpoints of the run directory belong to the run that begins from `reader`, or from nothing,
    and write down what that is. Once: if this command has begun before, nothing is done.

    Raises:
        OSError: The file system refuses.
    """
    if config.run.resume == "auto":
        if reader is None:      # what is saved from now on comes from no origin
            path(config).unlink(missing_ok=True)
    elif read(config) is None:
        _put_aside(config, reader)
        write_json(path(config), {"command": _command(config), "checkpoint": reader and str(reader.path.resolve())})


def _command(config: Config) -> dict[str, Any]:
    """What makes a command the same as an earlier one, as JSON has it."""
    resume = config.run.resume
    sections = config.to_dict()
    data = sections["data"]
    data["path"] = data["path"] and str(Path(data["path"]).resolve())
    del data["micro_batch_size"]    # is where and how fast, not what
    return {"resume": resume if resume == "never" else str(Path(resume).resolve()), "seed": config.run.seed,
            **{name: sections[name] for name in LEARNED}}


def spared(config: Config) -> int:
    """The step of the checkpoint that this command has begun from, if it lies in the run directory; else -1. As long as
    the command is the same it must stay."""
    begun = None if config.run.resume == "auto" else read(config)
    if begun is None or begun.checkpoint is None:
        return -1
    match = retention.COMPLETE.fullmatch(begun.checkpoint.name)
    ours = begun.checkpoint.parent.resolve() == (Path(config.run.dir) / CHECKPOINTS).resolve()
    return int(match[1]) if match and ours else -1


def _put_aside(config: Config, reader: Reader | None) -> None:
    """The run that begins must not find checkpoints newer than its own that are another's, nor another's metrics."""
    link = Path(config.run.dir) / CHECKPOINTS
    directory, metrics = link.resolve(), Path(config.run.dir) / METRICS
    if reader is not None and directory in reader.path.resolve().parents:
        _abandon(link, reader)
        return
    number = next(n for n in count(1) if not any(_old(path, n).exists() for path in (directory, metrics)))
    if directory.is_dir() and any(directory.iterdir()):
        aside = directory.rename(_old(directory, number))
        say(f"--run.resume {config.run.resume}: the checkpoints of an earlier run are now in {aside}")
    if link.is_symlink():
        directory.mkdir(exist_ok=True)  # whoever was killed before this may have left a link that leads nowhere
    if metrics.exists():
        aside = metrics.rename(_old(metrics, number))
        say(f"--run.resume {config.run.resume}: the metrics of an earlier run are now in {aside}")


def _old(path: Path, number: int) -> Path:
    """What it is called once it is put aside."""
    return path.with_name(f"{path.stem}.old-{number}{path.suffix}")


def _abandon(directory: Path, reader: Reader) -> None:
    """The one that is read stays where it is, with those before it, which it comes from."""
    found = retention.complete(directory)
    ancestor = reader.path.resolve() in [one.resolve() for one in found.values()]
    for step, one in found.items():
        if step > reader.step or not ancestor:
            say(f"{one}: the run begins from {reader.path}, and this one is now called "
                f"{retention.abandon(directory, step, one).name}")
