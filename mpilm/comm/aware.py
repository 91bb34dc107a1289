"""Whether MPI can be given a device's memory: asked, tried where it cannot hurt, tried for real, agreed by all ranks.

    found = answer(device, comm)
    found.usable, found.why         True, "MPI says that it knows GPUs, and a message arrived"

An MPI that does not know GPUs dies of a segmentation fault when it is given a GPU's pointer, and one that says it does
may have been started without what it needs. So before this process does it, another one, of one rank, sends a message
to itself. What the library says (Open MPI's MPIX_Query_cuda_support, MPICH's MPIX_GPU_query_support, Cray's
MPICH_GPU_SUPPORT_ENABLED) counts where nobody has asked for `--comm.transport device`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from mpilm.comm import arrays, p2p
from mpilm.comm.devices import Device
from mpilm.comm.transport import Direct

PROBE_S = 60.0
OF_LAUNCHERS = ("OMPI_COMM_WORLD_", "OMPI_UNIVERSE_", "PMIX_", "PMI_", "PRTE_", "PALS_", "HYDI_", "MPI_LOCAL", "SLURM_")
CUDA, HIP = 0, 2    # MPICH's numbers
VALUES = 1 << 18    # of a message that must be one by rendezvous


class Answer(NamedTuple):
    """Whether, and why or why not."""

    usable: bool
    why: str


def answer(device: Device, comm: MPI.Comm, *, ask: bool = True, probe: Sequence[str] = ()) -> Answer:
    """The same on all ranks. Collective over `comm`, which is every rank that will send messages.

    Args:
        ask: Believe an MPI that says no.
        probe: What to run as the other process; none: `_probe.py` with this device.
    """
    said = asked(os.environ) if ask else True
    if not all(comm.allgather(said)):
        return Answer(False, "MPI says that it does not know GPUs")
    problem = _first(comm, _tried_apart(device, comm, probe))
    if problem:
        return Answer(False, problem)
    problem = _first(comm, _tried(device, comm))
    return Answer(not problem, problem or "messages of a GPU's memory arrive")


def asked(environ: Mapping[str, str]) -> bool:
    """What the MPI library that is loaded says of GPUs. Local."""
    if "MPICH_GPU_SUPPORT_ENABLED" in environ:
        return environ["MPICH_GPU_SUPPORT_ENABLED"] == "1"
    library = ctypes.CDLL(_library())
    for name in ("MPIX_Query_cuda_support", "MPIX_Query_rocm_support", "MPIX_Query_hip_support"):
        query = getattr(library, name, None)
        if query is not None and query():
            return True
    query = getattr(library, "MPIX_GPU_query_support", None)
    return query is not None and any(_says_yes(query, kind) for kind in (CUDA, HIP))


def _says_yes(query: ctypes._NamedFuncPointer, kind: int) -> bool:
    flag = ctypes.c_int(0)
    return query(kind, ctypes.byref(flag)) == 0 and bool(flag.value)


def _library() -> str | None:
    """Where the MPI that is loaded lies: an extension's libraries are not found by name. None: whatever there is."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")[1] + line.partition("/")[2]
        if Path(path).name.startswith(("libmpi.so", "libmpich.so", "libmpi_cray.so", "libmpi_gnu")):
            return path
    return None


def _tried_apart(device: Device, comm: MPI.Comm, probe: Sequence[str]) -> str:
    """By a process of its own, one a node; what went wrong, on that rank."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    first = node.rank == 0
    node.Free()
    if not first:
        return ""
    command = list(probe) or [sys.executable, "-m", "mpilm.comm._probe", device.torch]
    environ = {key: value for key, value in os.environ.items() if not key.startswith(OF_LAUNCHERS)}
    try:
        done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=PROBE_S, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        return f"a process that tried gave no answer: {error}"
    if done.returncode == 0:
        return ""
    told = done.stderr.strip().splitlines()
    return f"a process that tried ended with {done.returncode}" + (f": {told[-1]}" if told else "")


def _tried(device: Device, comm: MPI.Comm) -> str:
    """Around the ring of all ranks; what went wrong, on this rank."""
    outgoing, incoming = device.zeros(VALUES, np.int64), device.zeros(VALUES, np.int64)
    arrays.put(np.arange(VALUES) + comm.rank, outgoing)
    ledger, left = Direct(device).ledger(), (comm.rank - 1) % comm.size
    ledger.receive(comm, incoming, source=left, tag=p2p.TAG_TRIED)
    ledger.send(comm, outgoing, dest=(comm.rank + 1) % comm.size, tag=p2p.TAG_TRIED)
    ledger.wait()
    right = (arrays.fetch(incoming) == np.arange(VALUES) + left).all()
    return "" if right else f"a message from rank {left} to rank {comm.rank} arrived as something else"


def _first(comm: MPI.Comm, problem: str) -> str:
    return next(filter(None, comm.allgather(problem)), "")
