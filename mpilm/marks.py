"""Marks: words by which a launcher knows more of a program than its exit code tells.

They are written to the file that the variable MPILM_MARKS of the environment names, a line each: `started`, `saved`
when a checkpoint is complete, `ended` when all has gone well. Who reads them: jobs/again.sh, jobs/ulfm.sh.
"""

from __future__ import annotations

import os
from contextlib import suppress

FILE = "MPILM_MARKS"
STARTED, SAVED, ENDED = "started", "saved", "ended"


def write(mark: str) -> None:
    """Add a line, if there is such a file; by one rank. What a file system has against it ends nothing."""
    if path := os.environ.get(FILE):
        with suppress(OSError), open(path, "a") as marks:
            marks.write(f"{mark}\n")
