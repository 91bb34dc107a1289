"""Nodes and the memory they share: every way of sharing is driven for real, and none leaves anything behind."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpilm.comm import memory
from mpilm.comm.node import Node, SharedMemoryError
from mpilm.log import UserError
from tests import helpers
from tests.helpers import REPOSITORY, Result

MIB = 2**20


def ours_in(folder: str | Path) -> list[str]:
    """Files of ours in a folder."""
    return [name for name in os.listdir(folder) if name.startswith("mpilm-")]


@pytest.fixture
def small(comm: MPI.Comm, tmp_path_all: Path) -> Iterator[Path]:
    """A file system of 2 MiB, which takes root to make."""
    folder = tmp_path_all / "small"
    if comm.rank == 0:
        folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    done = comm.rank == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not comm.bcast(done):
        pytest.skip("mounting a file system takes root")
    yield folder
    comm.Barrier()
    if comm.rank == 0:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_every_rank_is_on_one_node(comm: MPI.Comm) -> None:
    node = Node.build(comm)
    assert sorted(rank for ranks in node.members for rank in ranks) == list(range(comm.size))
    assert node.num_nodes == len(node.members)
    assert comm.rank in node.members[node.index]
    assert node.members[node.index][node.comm.rank] == comm.rank
    node.free()


@pytest.mark.parametrize("ranks_per_node", [1, 2, 3])
def test_emulated_nodes(comm: MPI.Comm, ranks_per_node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPILM_RANKS_PER_NODE", str(ranks_per_node))
    node = Node.build(comm)
    assert node.num_nodes == -(-comm.size // ranks_per_node)
    assert node.index == comm.rank // ranks_per_node
    assert node.comm.rank == comm.rank % ranks_per_node
    assert node.peers.size == sum(len(ranks) > node.comm.rank for ranks in node.members)
    node.free()


def test_ranks_per_node_must_be_a_number(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPILM_RANKS_PER_NODE", "two")
    with pytest.raises(UserError, match="MPILM_RANKS_PER_NODE=two"):
        Node.build(comm)


@pytest.mark.parametrize("way", ["memfd", "/dev/shm", "a folder", "what fails first"])
def test_parts_are_seen_by_all_ranks_of_the_node_only(comm: MPI.Comm, tmp_path_all: Path, way: str) -> None:
    ways = {"a folder": [str(tmp_path_all)], "what fails first": ["/nowhere", "memfd"]}.get(way, [way])
    node = Node.build(comm, ranks_per_node=2, ways=ways)
    for count, dtype in ((5, np.float32), (3000, np.int64), (1, np.uint16), (0, np.float32)):
        parts = node.allocate(count, dtype)
        assert [(part.shape, part.dtype) for part in parts] == [((count,), dtype)] * node.comm.size
        assert not any(part.any() for part in parts)
        node.comm.Barrier()
        parts[node.comm.rank][:] = 10 * comm.rank + 7
        comm.Barrier()
        for rank, part in zip(node.members[node.index], parts, strict=True):
            assert (part == 10 * rank + 7).all()
    common = node.allocate_common(100, np.float64)
    common[node.comm.rank :: node.comm.size] = node.index + 1.0
    comm.Barrier()
    assert (common == node.index + 1.0).all()
    assert not ours_in("/dev/shm")
    assert not ours_in(tmp_path_all)
    node.free()


@pytest.mark.ranks(min=2)
def test_too_small_a_folder_is_an_error_on_every_rank(comm: MPI.Comm, small: Path) -> None:
    """Not a SIGBUS at the first touch."""
    node = Node.build(comm, ways=[str(small)])
    fits = node.allocate_common(MIB // 4, np.float32)
    assert node.room() < 2 * MIB
    with pytest.raises(SharedMemoryError, match=rf"cannot share 8\.0 MiB: shared memory by {small}: No space left"):
        node.allocate_common(2 * MIB, np.float32)
    fits[:] = 1  # what was there before still is
    assert not ours_in(small)
    node.free()


@pytest.mark.ranks(min=2)
def test_too_small_a_folder_gives_way_to_the_next(
    comm: MPI.Comm, small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    node = Node.build(comm, ways=[str(small), "memfd"])
    array = node.allocate_common(2 * MIB, np.float32)
    array[comm.rank] = 1
    comm.Barrier()
    assert array[: comm.size].all()
    told = capfd.readouterr().err
    assert comm.rank > 0 or f"shared memory by {small}: No space left on device. Using memfd instead." in told
    node.free()


@pytest.mark.ranks(min=2)
def test_without_any_way_every_reason_is_told(comm: MPI.Comm) -> None:
    node = Node.build(comm, ways=["/nowhere", "/also/nowhere"])
    with pytest.raises(SharedMemoryError, match=r"/nowhere: No such file.*/also/nowhere: No such file"):
        node.allocate(1, np.float32)
    assert node.room() == 0
    node.free()


def test_another_file_at_the_same_path_is_noticed(tmp_path: Path) -> None:
    """In another container /proc/<pid>/fd/<n> may exist too, and be anything."""
    with (tmp_path / "other").open("wb+") as other:
        os.truncate(other.fileno(), 100)
        with pytest.raises(ValueError, match="do not see the same files"):
            memory._map(other.fileno(), 100, (1, 2), rank=0, size=1)


@pytest.mark.serial
def test_ranks_that_see_different_files_take_another_way(run_mpi: Callable[..., Result], tmp_path_all: Path) -> None:
    """Each rank has a file system of its own mounted on the folder, as in a container of its own."""
    program = """
import ctypes, subprocess, sys
from mpi4py import MPI
from mpilm.comm.node import Node
if ctypes.CDLL(None).unshare(0x00020000) or subprocess.run(["mount", "--make-rprivate", "/"]).returncode:
    sys.exit(77)
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", sys.argv[1]], check=True)
node = Node.build(MPI.COMM_WORLD, ways=[sys.argv[1], "memfd"])
array = node.allocate_common(10, "f4")
array[node.comm.rank] = 1
node.comm.Barrier()
assert array[:2].all()
"""
    result = run_mpi(2, ["-c", program, str(tmp_path_all)], cwd=REPOSITORY)
    if result.rc == 77:
        pytest.skip("a file system of one's own takes root")
    assert result.rc == 0, result.stderr
    assert f"shared memory by {tmp_path_all}: No such file or directory. Using memfd instead." in result.stderr


@pytest.mark.parametrize("ways", ["memfd", "/dev/shm"])
@pytest.mark.serial
def test_nothing_is_left_after_sigkill_of_all_ranks(ways: str, tmp_path_all: Path) -> None:
    program = """
import sys, time, pathlib
import numpy as np
from mpi4py import MPI
from mpilm.comm.node import Node
node = Node.build(MPI.COMM_WORLD)
parts = node.allocate(2**22, np.float32)
parts[node.comm.rank][:] = 1
node.comm.Barrier()
pathlib.Path(sys.argv[1], f"ready{MPI.COMM_WORLD.rank}").touch()
time.sleep(600)
"""
    job = helpers.start(2, ["-c", program, str(tmp_path_all)], env={"MPILM_SHARED_MEMORY": ways},
                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path_all.glob("ready*"))) < 2:
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)
        assert not ours_in("/dev/shm")  # while it runs, either
    finally:
        helpers.kill(helpers.descendants(job.pid))
        job.wait()
    assert not ours_in("/dev/shm")
