"""What a run tells: one line of metrics.jsonl a logged step, TensorBoard, and a line to read.

Only rank 0 writes. A resumed run takes back the lines of the steps it computes again.
"""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpilm.data._files import write_bytes
from mpilm.named import named
from mpilm.progress import Progress

FILE = "metrics.jsonl"


class Metrics:
    """Writes records to `directory` from `open` on; where that is not called (every rank but 0) all methods do nothing.

    Args:
        step: Steps already done; records after it are dropped from an earlier run's file.
        steps: Steps in all, for the time that is left.
    """

    def __init__(self, directory: Path, *, step: int, steps: int, tensorboard: bool) -> None:
        self.directory, self.steps, self.tensorboard = directory, steps, tensorboard
        self.started, self.first_step = time.perf_counter(), step
        self.file: Any = None
        self.events: Any = None

    def open(self) -> None:
        """Open every file.

        Raises:
            OSError: One of them cannot be written.
        """
        step, path = self.first_step, self.directory / FILE
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        write_bytes(path, "".join(kept).encode())
        self.file = path.open("a", buffering=1)
        self.progress = Progress(self.steps, done=step)
        if self.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self.events = SummaryWriter(str(self.directory), purge_step=step + 1)

    def record(self, values: dict[str, Any]) -> None:
        """Write one step's values; `step` is among them."""
        if self.file is None:
            return
        self._write(json.dumps({key: _finite(value) for key, value in values.items()}) + "\n")
        if self.events is not None:
            for key, value in values.items():
                if key != "step" and isinstance(value, int | float):
                    self.events.add_scalar(key, value, values["step"])
        self.progress.update(values["step"], _sentence(values, self._seconds_left(values["step"])))

    def _write(self, line: str) -> None:
        with named(self.file.name):
            if not self._there():
                self.file.close()
                self.file = (self.directory / FILE).open("a", buffering=1)
            self.file.write(line)

    def _there(self) -> bool:
        """Whether the file still has its name; without its folder there is no use in making another."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.directory / FILE))
        except FileNotFoundError:
            return not self.directory.is_dir()

    def _seconds_left(self, step: int) -> float:
        done = step - self.first_step
        return (time.perf_counter() - self.started) / max(1, done) * (self.steps - step)

    def close(self) -> None:
        """Flush and close every file."""
        if self.file is not None:
            with suppress(OSError):     # of a line that could not be written, which has been told
                self.file.close()
            self.progress.close()
        if self.events is not None:
            self.events.close()


def _lines(path: Path) -> list[str]:
    """Complete lines that are JSON objects with a step; a killed run may have left half a line."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and _has_step(line)]


def _has_step(line: str) -> bool:
    try:
        return isinstance(json.loads(line)["step"], int)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sentence(values: dict[str, Any], seconds_left: float) -> str:
    text = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  norm {values['grad_norm']:.2f}  " \
           f"{values['tokens_per_s']:,.0f} tokens/s  MFU {100 * values['mfu']:.1f} %"
    if "validation_loss" in values:
        text += f"  validation {values['validation_loss']:.4f}"
    return f"{text}  {_clock(seconds_left)} left"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
