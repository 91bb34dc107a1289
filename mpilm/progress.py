"""How far something is: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
from typing import Any

from mpilm.log import put


class Work:
    """What this process has got done so far besides training, whichever thread did it: a sign of life (heartbeat.py).

    Attributes:
        done: Bytes of files, mostly. Only that it grows means something.
    """

    done = 0


class Progress:
    """Progress of `total` steps.

    On a terminal one line is redrawn; elsewhere every update is a line of its own.
    """

    def __init__(self, total: int, *, done: int = 0, unit: str = "step") -> None:
        self.total, self.unit = total, unit
        self.bar: Any = None
        if on_terminal():
            self._open_bar(done)

    def _open_bar(self, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.bar = Progress(TextColumn(self.unit), MofNCompleteColumn(), BarColumn(bar_width=20),
                            TextColumn("{task.description}"), refresh_per_second=2)
        self.task = self.bar.add_task("", total=self.total, completed=done)
        self.bar.start()

    def update(self, done: int, text: str) -> None:
        """`done` of the total are done; `text` says what there is to say about them."""
        if self.bar is None:
            put(f"{self.unit} {done}/{self.total}  {text}", sys.stdout)
        else:
            self.bar.update(self.task, completed=done, description=text)

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self.bar is not None:
            self.bar.stop()


def on_terminal() -> bool:
    """Whether a person watches: mpirun gives its ranks a terminal of their own even if its output goes to a file."""
    if not sys.stdout.isatty():
        return False
    if not any(name.startswith(("OMPI_COMM_WORLD_", "PMI_")) for name in os.environ):
        return True
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith("/dev/pts/")
    except OSError:
        return False
