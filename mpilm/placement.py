"""Where a rank stands: what the launcher says about it, and its share of the node. Facts only, no MPI.

    launcher(os.environ)          who started this process, as which rank of how many (known before MPI_Init)
    cores()                       the physical cores this process may run on
    fair_threads([{0}, {1}], 0)   1: threads for rank 0, when ranks 0 and 1 of a node are bound to a core each
    table(places)                 the placement table that rank 0 prints

A core that k ranks may use counts 1/k for each of them, so any mixture of bound and unbound ranks gets threads that
together fill the node once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
MOST_THREADS = 1024  # of a rank; the run-time library of OpenMP crashes where the system gives it no more
LINES_AT_MOST = 16
# Slurm counts the batch script and an interactive shell as steps too, with numbers from here on.
NOT_A_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Launcher:
    """What the launcher's environment variables say; None where they say nothing.

    Args:
        kind: `openmpi` and `hydra` (mpirun of MPICH or Intel MPI), `pmi`, `pmix`, `slurm`, `torchrun`.
        name: For messages.
        variable: The variable that `size` was read from.
        size: Ranks of the whole program (a lower bound for `pmix`).
        rank: Number of this one.
        local_rank: Its number on its node.
        local_size: Ranks on the node.
    """

    kind: str
    name: str
    variable: str
    size: int
    rank: int
    local_rank: int | None
    local_size: int | None


def launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Who started this process; None: nobody, it is alone.

    mpirun's variables count before Slurm's: inside a Slurm job both are there, and Slurm's then describe the shell
    or the daemon that mpirun was started from.
    """
    local_rank = _first(environ, "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK",
                        "PALS_LOCAL_RANKID", "SLURM_LOCALID")
    torchrun = "TORCHELASTIC_RUN_ID" in environ
    local_size = _first(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE")
    rank = _first(environ, "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "PALS_RANKID",
                  *(["RANK"] if torchrun else []), "SLURM_PROCID") or 0
    hydra = "MPI_LOCALNRANKS" in environ
    step = (_first(environ, "SLURM_STEP_ID") or 0) < NOT_A_STEP and "SLURM_STEP_ID" in environ
    candidates = [
        ("openmpi", "Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE"),
        ("hydra", "the mpirun of MPICH or Intel MPI", "PMI_SIZE") if hydra else ("pmi", "a PMI launcher", "PMI_SIZE"),
        *([("torchrun", "torchrun", "WORLD_SIZE")] if torchrun else []),
        ("slurm", "srun", "SLURM_STEP_NUM_TASKS"),
        ("slurm", "srun", "SLURM_NTASKS"),
    ]
    for kind, name, variable in candidates:
        size = _first(environ, variable)
        if size is not None and (step or kind != "slurm"):
            return Launcher(kind, name, variable, size, rank, local_rank, local_size)
    if "PMIX_RANK" in environ:
        return Launcher("pmix", "a PMIx launcher", "PMIX_RANK", rank + 1, rank, local_rank, local_size)
    return None


def _first(environ: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return None


def mig(environ: Mapping[str, str], local_rank: int) -> str | None:
    """Of several MIG instances, the one of this rank: a process can use one, and CUDA would take the first. None: the
    environment names none, or one, or GPUs."""
    named = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return named[local_rank % len(named)] if len(named) > 1 and named[0].startswith("MIG-") else None


def doubled(uuids: Sequence[str]) -> dict[str, list[int]]:
    """The devices that several ranks of a node have, each with these ranks' numbers on the node."""
    ranks: dict[str, list[int]] = {}
    for rank, uuid in enumerate(uuids):
        ranks.setdefault(uuid, []).append(rank)
    return {uuid: several for uuid, several in ranks.items() if uuid and len(several) > 1}


def cores() -> list[int]:
    """Physical cores this process may run on, each named by its lowest logical CPU, in order."""
    return sorted({_first_sibling(cpu) for cpu in os.sched_getaffinity(0)})


def _first_sibling(cpu: int) -> int:
    try:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        return int(re.split("[-,\n]", siblings)[0])
    except (OSError, ValueError):
        return cpu


def fair_threads(cores_of_ranks: Sequence[set[int]], local_rank: int, *, quota: float = math.inf) -> int:
    """Threads for one rank of a node: its share of its cores and of the container's `quota` of CPU seconds a second."""
    share = sum(1 / sum(core in others for others in cores_of_ranks) for core in cores_of_ranks[local_rank])
    return max(1, int(min(share, quota / len(cores_of_ranks)) + 1e-6))


def cpu_quota() -> float:
    """CPU seconds a second that the container may use; infinite where nothing limits it."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def available_memory() -> int:
    """Bytes of memory that programs on this node can still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def wanted_threads(environ: Mapping[str, str], variable: str = "OMP_NUM_THREADS") -> int | None:
    """What the user asked for with OMP_NUM_THREADS ("4", or "4,2" for nested regions); None: nothing sensible."""
    outermost = environ.get(variable, "").partition(",")[0].strip()
    return int(outermost) if outermost.isdecimal() and int(outermost) > 0 else None


@dataclass(frozen=True)
class Place:
    """One line of the placement table. `memory` in bytes: the rank's share of what its node has available."""

    rank: int
    host: str
    device: str
    cores: tuple[int, ...]
    threads: int
    memory: int


def table(places: Sequence[Place]) -> str:
    """Rank, host, device, cores, threads and memory in aligned columns; above 16 ranks one line for each host."""
    head = ("rank", "host", "device", "cores", "threads", "memory")
    rows: list[tuple[str, ...]]
    if len(places) <= LINES_AT_MOST:
        rows = [(str(p.rank), p.host, p.device, _ranges(p.cores), str(p.threads), _gib(p.memory)) for p in places]
    else:
        rows = [_host_row(list(group)) for _, group in groupby(places, key=lambda place: place.host)]
    left_out = len(rows) - LINES_AT_MOST
    rows = [head, *rows[:LINES_AT_MOST]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + ([f"... and {left_out} more lines like these"] if left_out > 0 else []))


def _host_row(places: list[Place]) -> tuple[str, ...]:
    devices = list(dict.fromkeys(place.device for place in places))
    threads = sorted({place.threads for place in places})
    return (_ranges([place.rank for place in places]), places[0].host,
            devices[0] if len(devices) == 1 else f"{devices[0]} .. {devices[-1]}",
            _ranges(sorted({core for place in places for core in place.cores})),
            "-".join(map(str, dict.fromkeys((threads[0], threads[-1])))), f"{_gib(places[0].memory)} each")


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
