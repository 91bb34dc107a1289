"""How far the encoding is: a bar on a terminal, a line now and then in a log. Rank 0 tells; the others only count.

    progress = Progress("encoding", total=10_000_000, show=comm.rank == 0)
    progress.advance(65536)
"""

from __future__ import annotations

import time
from typing import Any

from mpilm.log import say
from mpilm.progress import Work, on_terminal

LINE_EVERY_S = 10.0


class Progress:
    """Bytes done of bytes to do."""

    def __init__(self, what: str, *, total: int, show: bool) -> None:
        self._what, self._total, self._done, self._show = what, max(total, 1), 0, show
        self._start = self._told = time.monotonic()
        self._bar: Any = None
        if show and on_terminal():
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()

    def advance(self, done: int) -> None:
        """So many bytes more are done."""
        Work.done += done
        self._done = min(self._total, self._done + done)  # what is written may be more than what was expected
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif self._show and self._done and time.monotonic() > self._told + LINE_EVERY_S:
            self._told = time.monotonic()
            rate = self._done / (self._told - self._start)
            say(f"{self._what}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB "
                f"({100 * self._done // self._total} %), {rate / 1e6:.1f} MB/s, "
                f"{(self._total - self._done) / rate / 60:.0f} min to go")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
