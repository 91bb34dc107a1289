"""Launchers as their variables show them, shares of cores, and the placement table."""

from __future__ import annotations

import math

import pytest

from mpilm import placement
from mpilm.placement import Place, fair_threads, launcher, table

OPENMPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_RANK": "5"}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
BATCH_SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = BATCH_SHELL | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "1"}


def test_alone():
    assert launcher({"PATH": "/bin"}) is None


@pytest.mark.parametrize(("environ", "kind", "size", "rank", "local_rank"), [
    (OPENMPI, "openmpi", 8, 5, 1),
    (HYDRA, "hydra", 4, 3, 3),
    ({"PMI_SIZE": "4", "PMI_RANK": "3", "PMI_LOCAL_RANK": "1"}, "pmi", 4, 3, 1),
    ({"PMI_SIZE": "4", "PMI_RANK": "3", "PALS_LOCAL_RANKID": "2"}, "pmi", 4, 3, 2),
    (SRUN, "slurm", 4, 2, 1),
    ({"PMIX_RANK": "2"}, "pmix", 3, 2, None),
    (BATCH_SHELL | OPENMPI, "openmpi", 8, 5, 1),
    (SRUN | OPENMPI, "openmpi", 8, 5, 1),
    (SRUN | HYDRA, "hydra", 4, 3, 3),
    (SRUN | {"PMIX_RANK": "2"}, "slurm", 4, 2, 1),
    (SRUN | {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1"}, "torchrun", 2, 1, 1),
    (OPENMPI | {"WORLD_SIZE": "2", "RANK": "1"}, "openmpi", 8, 5, 1),
])
def test_launcher(environ, kind, size, rank, local_rank):
    found = launcher(environ)
    assert found is not None
    assert (found.kind, found.size, found.rank, found.local_rank) == (kind, size, rank, local_rank)


@pytest.mark.parametrize("step", ["4294967291", "4294967290"])
def test_batch_and_interactive_shells_are_no_steps(step):
    assert launcher(BATCH_SHELL) is None
    assert launcher(BATCH_SHELL | {"SLURM_STEP_ID": step, "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(("cores_of_ranks", "threads"), [
    ([{0}, {1}], [1, 1]),
    ([{0, 1}, {0, 1}], [1, 1]),
    ([set(range(8))], [8]),
    ([set(range(8))] * 3, [2, 2, 2]),
    ([set(range(8))] * 16, [1] * 16),
    ([{0, 1, 2, 3}, {4, 5, 6, 7}], [4, 4]),
    ([{0, 1, 2, 3}, {3}], [3, 1]),
])
def test_fair_threads(cores_of_ranks, threads):
    assert [fair_threads(cores_of_ranks, rank) for rank in range(len(cores_of_ranks))] == threads


def test_a_container_limits_threads():
    assert fair_threads([set(range(64))] * 2, 0, quota=8.0) == 4
    assert fair_threads([set(range(64))] * 2, 0, quota=0.5) == 1


def test_facts_of_this_machine():
    assert placement.cores()
    assert placement.available_memory() > 2**20
    assert 0 < placement.cpu_quota() <= math.inf


@pytest.mark.parametrize(("value", "threads"), [("4", 4), ("4,2", 4), ("", None), ("0", None), ("many", None)])
def test_wanted_threads(value, threads):
    assert placement.wanted_threads({"OMP_NUM_THREADS": value}) == threads


def test_small_table_has_a_line_a_rank():
    lines = table([Place(rank, "n1", "cpu", (rank,), 1, 3 * 2**30) for rank in range(4)]).splitlines()
    assert lines[0].split() == ["rank", "host", "device", "cores", "threads", "memory"]
    assert lines[3].split() == ["2", "n1", "cpu", "2", "1", "3.0", "GiB"]
    assert len(lines) == 5


def test_large_table_has_a_line_a_host():
    places = [Place(rank, f"n{rank // 8:04}", f"cuda:{rank % 8}", (2 * (rank % 8), 2 * (rank % 8) + 1), 2, 2**33)
              for rank in range(8 * 40)]
    lines = table(places).splitlines()
    assert lines[1].split() == ["0-7", "n0000", "cuda:0", "..", "cuda:7", "0-15", "2", "8.0", "GiB", "each"]
    assert len(lines) == 18
    assert lines[-1] == "... and 24 more lines like these"
