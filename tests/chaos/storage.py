"""A file system that refuses from a random call on (refuse.c): the reason is told, and nothing good is lost."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from mpilm.checkpoint import Alone, newest
from tests.chaos.jobs import Job, weights
from tests.chaos.kills import Trial

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
USER_ERROR = 2


def library(folder: Path) -> Path | None:
    """refuse.c compiled; None without a compiler."""
    built = folder / "refuse.so"
    compiler = next(filter(shutil.which, ("gcc", "cc", "g++", "clang")), None)
    if compiler is None:
        return None
    source = Path(__file__).with_name("refuse.c")
    subprocess.run([compiler, "-x", "c", "-O1", "-shared", "-fPIC", "-o", str(built), str(source), "-ldl"], check=True)
    return built


def refused(trials: int, draw: random.Random, data: Path, folder: Path, *, ranks: int = 0) -> Iterator[Trial]:
    """Of all calls that write below the run directory, one fails and all after it; then the disk is mended."""
    built = library(folder)
    assert built is not None, "there is no C compiler"
    total, wanted = undisturbed(built, data, folder, ranks)
    for number in range(trials):
        call, error, directory = draw.randint(1, total), draw.choice(ERRORS), folder / f"refused-{number}"
        environment = {"LD_PRELOAD": str(built), "REFUSE_BELOW": f"{directory}/", "REFUSE_CALL": str(call),
                       "REFUSE_ERRNO": str(error)}
        with Job(ranks, data, directory, environment=environment) as job:
            code = job.wait()
        problem = _problem(job, code, error, directory)
        if not problem:
            with Job(ranks, data, directory) as job:
                code = job.wait()
            found = weights(directory)
            problem = "" if code == 0 and found == wanted else f"afterwards exit code {code}, weights {found}"
        yield Trial(f"{errno.errorcode[error]} from call {call} of {total} on", problem and f"{problem}: {job.words}")
        if not problem:
            shutil.rmtree(directory, ignore_errors=True)


def undisturbed(built: Path, data: Path, folder: Path, ranks: int) -> tuple[int, str]:
    """Of a job that nothing happens to, the calls that write, with several ranks of the one that writes last; and its
    weights."""
    tally, directory = folder / "calls", folder / "counted"
    environment = {"LD_PRELOAD": str(built), "REFUSE_BELOW": f"{directory}/", "REFUSE_COUNT": str(tally)}
    with Job(ranks, data, directory, environment=environment) as job:
        assert job.wait() == 0, job.words.read_text()
    return int(tally.read_text()), weights(directory)


def _problem(job: Job, code: int | None, error: int, directory: Path) -> str:
    said = job.words.read_text(errors="replace")
    if code not in (0, USER_ERROR):
        return f"exit code {code}"
    if "Traceback" in said:
        return "a traceback"
    if os.strerror(error) not in said or str(directory) not in said:
        return "the reason is not told"
    told: list[str] = []
    if (directory / "checkpoints").is_dir():
        newest(directory / "checkpoints", Alone(), tell=told.append)
    return f"what is left is damaged: {told}" if told else ""
