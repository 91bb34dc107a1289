"""The benchmark of GPUs: it says so where there is none, and its parts run on what a host has."""

from __future__ import annotations

import os
from typing import Any

import pytest
from mpi4py import MPI

from mpilm.bench import _gpu_links, _gpu_steps
from mpilm.comm.transport import ON_HOST, Direct, Staged
from mpilm.launch import session
from tests.comm.late import Late


@pytest.mark.serial
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU")
def test_without_a_gpu_it_says_so(run_mpi: Any) -> None:
    result = run_mpi(0, ["-m", "mpilm.bench", "gpu"])
    assert (result.rc, "Traceback" in result.stderr) == (2, False), result
    assert "no GPU is to be seen" in result.stderr


def test_links(comm: MPI.Comm) -> None:
    late, told = Late(comm.rank), {}
    _gpu_links.run(comm, lambda case, who, value, unit: told.update({who: value}), [Staged(late), Direct(late)],
                   sizes_mib=[1], rounds=1)
    expected = {"copy", "to host", "from host", "copy of the host", "shared ()", "ring (staged)", "ring (device)"}
    assert expected <= set(told)
    assert all(value > 0 or comm.size == 1 for value in told.values())


def steps() -> dict[str, float]:
    told = {}
    with session() as world:
        _gpu_steps.run(world, lambda case, who, value, unit: told.update({who: value}), ON_HOST, "tiny", rounds=1,
                       steps=1, reproducible=True, peer=True)
    return told


@pytest.mark.slow
@pytest.mark.ranks(min=2)
def test_steps() -> None:
    told = steps()
    assert min(told["mpilm"], told["mpilm-reproducible"]) > 0
    assert "llama-compile" not in told, "which is one process"


@pytest.mark.slow
@pytest.mark.serial
def test_steps_beside_a_peer() -> None:
    assert min(steps()[who] for who in ("mpilm", "mpilm-reproducible", "llama-compile")) > 0
