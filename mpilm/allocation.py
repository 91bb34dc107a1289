"""When the batch system will end this job. Facts only, no MPI.

    end = ends_at(os.environ)       seconds since 1970, or None: nobody has set a limit, or nobody can tell
    end = ends_at(os.environ, again=True)       it may have been put off since the job began
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping

ANSWER_S = 20.0     # a batch system that is busy takes its time


def ends_at(environ: Mapping[str, str], *, again: bool = False, patience_s: float = ANSWER_S) -> float | None:
    """The end of the allocation: Slurm's word in the environment, else, and if it is asked for `again`, what squeue or
    qstat says within `patience_s` seconds."""
    if environ.get("SLURM_JOB_END_TIME", "").isdecimal() and not again:
        return float(environ["SLURM_JOB_END_TIME"])
    left = None
    if job := environ.get("SLURM_JOB_ID"):
        left = seconds(_answer(patience_s, "squeue", "--noheader", "--job", job, "--format", "%L"))
    elif job := environ.get("PBS_JOBID"):
        left = pbs_left(_answer(patience_s, "qstat", "-f", job))
    return None if left is None else time.time() + left


def _answer(patience_s: float, *command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=patience_s, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def seconds(text: str) -> float | None:
    """Of a duration as batch systems write it; None for anything else, such as UNLIMITED.

    >>> seconds("1-02:03:04"), seconds("02:03:04"), seconds("3:04"), seconds("UNLIMITED")
    (93784.0, 7384.0, 184.0, None)
    """
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if found is None:
        return None
    days, hours, minutes, rest = (int(group or 0) for group in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def pbs_left(text: str) -> float | None:
    """What `qstat -f` leaves of the time that was asked for."""
    times = [re.search(rf"{kind}\.walltime = ([\d:]+)", text) for kind in ("Resource_List", "resources_used")]
    wanted, used = (seconds(found[1]) if found else None for found in times)
    return None if wanted is None else wanted - (used or 0.0)
