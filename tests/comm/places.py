"""Where the arrays of a test live, and how they get to MPI: the same tests run in all of PLACES.

    host            NumPy arrays
    late-device     tests/comm/late.py, whose memory MPI is given
    late-staged     the same, through pinned memory
    gpu-device      a GPU, with an MPI that knows GPUs
    gpu-staged      a GPU
"""

from __future__ import annotations

import os
from functools import cache

import pytest
from mpi4py import MPI

from mpilm.comm import aware
from mpilm.comm.devices import HOST, Device
from mpilm.comm.transport import MENU, Staged, Transport
from tests.comm.late import Late

PLACES = ("host", "late-device", "late-staged", "gpu-device", "gpu-staged")
SMALL_PIECES = 64 * 2**10   # so that a test's messages are of several
LATE_COUNT = 150_001
MARKS = {"gpu": [pytest.mark.gpu], "late": [pytest.mark.slow]}


def pairs(*names: str) -> list[object]:
    """(place, name) for every place and name."""
    return [pytest.param((place, name), id=f"{name}-{place}" if place != "host" else name,
                         marks=MARKS.get(place.partition("-")[0], []))
            for place in PLACES for name in names]


def fitting(device: Device, count: int) -> int:
    """So many elements, or as many as a device that takes its time can do a test with."""
    return min(count, LATE_COUNT) if isinstance(device, Late) else count


def transport(place: str, comm: MPI.Comm) -> Transport:
    """Of that place; skips where there is none. Collective over `comm`."""
    where, _, how = place.partition("-")
    device = DEVICES[where](comm)
    if how == "staged":
        return Staged(device, piece_bytes=SMALL_PIECES if where == "late" else 0)
    if where == "gpu" and not _usable(device.torch, comm.size):
        pytest.skip("this MPI can't be given a GPU's memory")
    return MENU[how or "device"](device)


@cache
def _usable(name: str, size: int) -> bool:
    """What MPI takes, found out once: every test is of the same ranks."""
    return aware.answer(gpu(MPI.COMM_WORLD), MPI.COMM_WORLD).usable


def gpu(comm: MPI.Comm) -> Device:
    """The GPU of this rank; ranks may share one. Skips where there is none."""
    cupy = pytest.importorskip("cupy", reason="needs a GPU and CuPy")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        count = 0
    if not count:
        pytest.skip("there is no GPU")
    from mpilm.comm.devices.cuda import Cuda

    return Cuda(int(os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", comm.rank)) % count)


DEVICES = {"host": lambda comm: HOST, "late": lambda comm: Late(comm.rank), "gpu": gpu}
