"""What the program tells a person: plain lines from rank 0, to the terminal and into the run directory.

    say("step 100  loss 3.21")      stdout and log.txt, on rank 0 only
    warn("2 ranks share one core")  the same, to stderr, marked as a warning
    raise UserError("--data.path tokens/: there is no index.json. Run data_prep.encode first.")

The state is that of Python's `logging`, under the name "mpilm": before `setup` every process prints, because
nothing knows its rank yet; after it ranks above 0 are quiet.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

_LOGGER = logging.getLogger("mpilm")


class UserError(Exception):
    """A user's mistake. The message says what was given, what is allowed and what to type.

    It is told without a traceback, and the program ends with exit code 2 on every rank.
    """


class HostError(UserError):
    """A mistake that other ranks, on other hosts, may not have made: a file that is not there, a GPU that is broken."""


def put(text: str, stream: TextIO) -> None:
    """Print a line to stdout or stderr. The program does not end for want of either, nor of a character there."""
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:
        print(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding), file=stream, flush=True)
    except OSError as error:    # full, or closed as by `| head`
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1 if stream is sys.stdout else 2)
        os.close(nothing)
        if stream is sys.stdout:
            print(f"warning: standard output: {error.strerror}. Nothing more is printed there.", file=sys.stderr)


class _Console(logging.Handler):
    """Prints to what sys.stdout and sys.stderr are at that moment, so that a live progress line can step aside."""

    def emit(self, record: logging.LogRecord) -> None:
        put(self.format(record), sys.stderr if record.levelno >= logging.WARNING else sys.stdout)


class _File(logging.handlers.WatchedFileHandler):
    """Makes the file anew if somebody has removed it. The program does not end for want of a log: what follows is on
    the terminal, and the metrics tell it too."""

    complained = False

    def emit(self, record: logging.LogRecord) -> None:
        """As any handler."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say it once."""
        if not self.complained:
            self.complained = True
            print(f"warning: {self.baseFilename}: {sys.exc_info()[1]}. The log is incomplete.", file=sys.stderr)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"warning: {record.getMessage()}" if record.levelno >= logging.WARNING else record.getMessage()


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "rank"), counted(2000, "file")
    ('1 rank', '2,000 files')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def setup(rank: int, run_dir: str | Path | None = None) -> None:
    """Make rank 0 the one that talks, and append what it says to `run_dir`/log.txt.

    May be called again, for instance when the run directory becomes known; the last call counts.
    """
    for handler in list(_LOGGER.handlers):
        _LOGGER.removeHandler(handler)
        with suppress(OSError):     # what could not be written has been told
            handler.close()
    _LOGGER.setLevel(logging.INFO if rank == 0 else logging.CRITICAL + 1)
    _LOGGER.propagate = False
    console = _Console()
    console.setFormatter(_Plain())
    _LOGGER.addHandler(console)
    if rank == 0 and run_dir is not None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        file = _File(Path(run_dir) / "log.txt", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        _LOGGER.addHandler(file)


def say(text: str) -> None:
    """Print `text` as plain lines to stdout. Ranks above 0 say nothing."""
    _ready().info("%s", text)


def warn(text: str) -> None:
    """Print `text` to stderr as a warning. Ranks above 0 say nothing."""
    _ready().warning("%s", text)


def note(text: str) -> None:
    """Write to log.txt alone what is told another way."""
    for handler in _LOGGER.handlers:
        if isinstance(handler, _File):
            handler.handle(_LOGGER.makeRecord(_LOGGER.name, logging.INFO, "", 0, text, (), None))


def _ready() -> logging.Logger:
    if not _LOGGER.handlers:
        setup(rank=0)
    return _LOGGER
