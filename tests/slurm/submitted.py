"""A script of jobs/, submitted to a cluster of the tests, and small enough for it.

    job = Submitted(cluster, "train_one_node", *small_jobs.arguments(...), log=tmp_path / "log.txt")
    job.ends() == ("COMPLETED", 0)
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.slurm.cluster import Cluster

SMALL = ("--ntasks-per-node=2", "--time=5")
SECONDS = 120.0
# Both nodes are on the same cores, which a rank that counts those of its node cannot know.
GIVE_WAY = {"OMPI_MCA_mpi_yield_when_idle": "1", "MPIR_CVAR_POLLS_BEFORE_YIELD": "1"}
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY"}


def settings(site: str, directory: Path) -> dict[str, str]:
    """What the scripts read from the environment: this Python's, and the settings of its MPI, which keeps its files in
    `directory`."""
    is_environment = (Path(sys.prefix) / "bin" / "activate").exists()
    return {"MPILM_SITE": site, "MPILM_VENV": sys.prefix if is_environment else "none", "MPILM_PAUSE_S": "1",
            **GIVE_WAY, **files(directory)}


def files(directory: Path) -> dict[str, str]:
    """Where Open MPI's shared memory is: a process without others on its node leaves it behind."""
    return {"OMPI_MCA_btl_sm_backing_directory": str(directory)}


class Submitted:
    """A job; `options` are sbatch's and come after `SMALL`. What it prints is in `log`."""

    def __init__(self, cluster: Cluster, script: str, *arguments: str, log: Path, options: Sequence[str] = (),
                 site: str = "openmpi") -> None:
        self.cluster, self.log = cluster, log
        given = [f"{name}={value}" for name, value in settings(site, cluster.directory).items()]
        command = ["env", *given, "sbatch", "--parsable", f"--output={log}", *SMALL, *options, f"jobs/{script}.slurm"]
        self.id = cluster.ask(*command, *arguments).strip()

    def __getitem__(self, field: str) -> str:
        """What scontrol says about it: JobState, Restarts, ExitCode, Reason ..."""
        words = self.cluster.ask("scontrol", "--oneliner", "show", "job", self.id).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)[field]

    @property
    def words(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()`; fail with what it has printed when that takes too long."""
        self.cluster.until(ready, f"job {self.id} does not get there", seconds=SECONDS, more=lambda: self.words)

    def ends(self) -> tuple[str, int]:
        """Wait for its end: state and exit code."""
        self.until(lambda: self["JobState"] in OVER)
        return self["JobState"], int(self["ExitCode"].partition(":")[0])

    def element(self, number: int) -> Submitted:
        """An element of an array."""
        found = copy.copy(self)
        found.id = f"{self.id}_{number}"
        return found

    def cancel(self) -> None:
        """scancel; returns when it has ended."""
        self.cluster.ask("scancel", self.id)
        self.ends()


def steps(directory: Path) -> int:
    """Steps whose metrics are written."""
    path = directory / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0
