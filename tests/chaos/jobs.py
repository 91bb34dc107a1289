"""Small training jobs that can be hurt while they run.

    with Job(3, data, directory, ulfm=True, **{"parallel.pp": 1}) as job:
        job.until_step(5)
        job.kill(1)
        code = job.wait()
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mpilm import inspect
from mpilm.log import UserError
from tests import helpers, small_jobs

OPTIONS = {"run.steps": 40, "log.every": 1, "log.validate_every": 15, "log.validation_sequences": 8,
           "checkpoint.every": 6, "model.layers": 2, "model.width": 64}
SECONDS = 120


class Job:
    """A job of `mpilm.train` on `ranks` ranks, `launcher` and `tuned` as `helpers.start`; what it says is in
    `directory`.txt."""

    def __init__(self, ranks: int, data: Path, directory: Path, *, ulfm: bool = False, tuned: bool = False,
                 launcher: Sequence[str] = (), environment: Mapping[str, str] | None = None,
                 program: Sequence[str] = ("mpilm.train",), **changes: Any) -> None:
        self.directory, self.words = directory, directory.with_suffix(".txt")
        options = OPTIONS | changes
        with self.words.open("a") as words:
            args = ["-m", *program, *small_jobs.arguments(data, directory, **options)]
            self.process = helpers.start(ranks, args, launcher=[*launcher, *(["--with-ft", "ulfm"] if ulfm else [])],
                                         stdout=words, stderr=subprocess.STDOUT, env=environment, tuned=tuned)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
                 ) -> None:
        if self.process.poll() is None:
            helpers.end(self.process)
            self.process.wait()

    @property
    def steps(self) -> int:
        """Steps whose metrics are written."""
        path = self.directory / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def until_step(self, step: int, seconds: float = SECONDS) -> bool:
        """Wait for so many lines of metrics; False if the job ended before, or takes longer."""
        return self.until(lambda: self.steps >= step, seconds)

    def until(self, ready: Any, seconds: float = SECONDS) -> bool:
        """Wait until `ready()`; False if the job ended before, or takes longer."""
        deadline = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return bool(ready())    # it may have come to be so with the end of the job
            time.sleep(0.002)
        return True

    def ranks(self) -> dict[int, int]:
        """Process ids by rank, of those that are there."""
        found = {}
        for pid in helpers.descendants(self.process.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                numbers = [word for word in words if word.startswith((b"OMPI_COMM_WORLD_RANK=", b"PMI_RANK="))]
                if numbers and b"mpilm.train" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found[int(numbers[0].split(b"=")[1])] = pid
        return found

    def signal(self, rank: int, number: int) -> bool:
        """Send a signal to one rank; whether it was there."""
        pid = self.ranks().get(rank)
        with contextlib.suppress(ProcessLookupError):
            if pid is not None:
                os.kill(pid, number)
                return True
        return False

    def kill(self, rank: int) -> bool:
        """SIGKILL one rank; whether it was there."""
        return self.signal(rank, signal.SIGKILL)

    def kill_all(self) -> None:
        """SIGKILL the launcher and everyone."""
        helpers.kill(helpers.descendants(self.process.pid))
        self.process.wait()

    def wait(self) -> int | None:
        """The exit code; None if it does not end."""
        try:
            return self.process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return None


def weights(directory: Path) -> str:
    """Step and digest of the newest checkpoint's weights; what is wrong, if there is none."""
    try:
        found = inspect.describe(inspect.find(directory))
    except UserError as error:
        return str(error)
    return f"{found['step']} {found['weights_sha256']}"


Curve = list[tuple[int, float, float, float, float | None]]


def losses(directory: Path) -> Curve:
    """(step, loss, learning rate, gradient norm, validation loss) of every line of metrics."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["lr"], line["grad_norm"], line.get("validation_loss")) for line in lines]
