"""A file system that refuses: the same clear error on every rank, earlier checkpoints intact, and saving can go on."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess

import numpy as np
import pytest

from mpilm.checkpoint import Piece, Writer, newest
from mpilm.log import UserError
from tests.checkpoint_cases import assert_holds, cut, tensors, write


@contextlib.contextmanager
def small_disk(comm, where, options):
    """A real file system with little room. Collective; skips on all ranks where this user may not mount one."""
    problem = None
    if comm.rank == 0:
        where.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)],
                              capture_output=True, text=True, check=False)
        problem = done.stderr.strip() if done.returncode else None
    if problem := comm.bcast(problem):
        pytest.skip(f"mounting a small tmpfs: {problem}")
    try:
        yield where
    finally:
        comm.Barrier()
        if comm.rank == 0:
            subprocess.run(["umount", str(where)], check=True)


def pieces(comm, mib, value):
    """`mib` MiB on every rank."""
    values = np.full(mib << 18, value, np.float32)
    return [Piece("model.w", (values.size * comm.size,), values.size * comm.rank, values)]


def assert_refused(comm, call, *words):
    """Every rank raises the same UserError, with these words in it."""
    with pytest.raises(UserError) as told:
        call()
    assert len(set(comm.allgather(str(told.value)))) == 1
    for word in words:
        assert word in str(told.value)


def assert_only(comm, directory, *names):
    comm.Barrier()
    assert sorted(os.listdir(directory)) == sorted(names)
    comm.Barrier()


def test_too_little_room_is_found_before_anything_is_written(comm, tmp_path_all):
    with small_disk(comm, tmp_path_all / "disk", "size=20m") as disk:
        writer = Writer(disk / "c", comm, keep_last=2)
        writer.save(1, pieces(comm, 12 // comm.size, 1), {})
        writer.wait()
        assert_refused(comm, lambda: writer.save(2, pieces(comm, 12 // comm.size, 2), {}),
                       "step 2", "rank 0", "No space left", "12.6 MB are needed", "MB are free", "intact")
        assert_only(comm, disk / "c", "step-00000001")
        assert newest(disk / "c", comm).read("model.w", 5, 1) == [1]
        writer.save(3, pieces(comm, 4 // comm.size, 3), {})
        writer.wait()
        assert newest(disk / "c", comm).step == 3


def test_no_earlier_one_is_promised_where_there_is_none(comm, tmp_path_all):
    with small_disk(comm, tmp_path_all / "disk", "size=2m") as disk:
        writer = Writer(disk / "c", comm)
        assert_refused(comm, lambda: writer.save(2, pieces(comm, 12 // comm.size, 2), {}), "No earlier one is in")


def test_a_disk_that_fills_up_while_it_is_written(comm, tmp_path_all):
    with small_disk(comm, tmp_path_all / "disk", "size=100m,nr_inodes=13") as disk:
        write(disk / "c", comm, [1], keep_last=2)
        comm.Barrier()
        if comm.rank == 0:
            while os.statvfs(disk).f_ffree > 1:
                (disk / f"other-{os.statvfs(disk).f_ffree}").touch()
        comm.Barrier()
        writer = Writer(disk / "c", comm, keep_last=2)
        writer.save(2, pieces(comm, 1, 2), {})
        assert_refused(comm, writer.wait, "step 2", "rank ", "rank-0000", "No space left", "are free")
        assert_only(comm, disk / "c", "step-00000001")
        assert_holds(newest(disk / "c", comm), tensors(1))


@pytest.mark.serial
def test_what_cannot_be_removed_is_in_nobodys_way(comm, tmp_path, capfd):
    """Neither at the start of a run, nor when that step is saved, nor when older ones go."""
    busy = {number: tmp_path / f".step-0000000{number}.partial" for number in (1, 2)}
    for path in busy.values():
        path.mkdir()
    with small_disk(comm, busy[1] / "disk", "size=1m"), small_disk(comm, busy[2] / "disk", "size=1m"):
        busy[1].rename(tmp_path / "step-00000001")
        write(tmp_path, comm, [2, 3], keep_last=1)
        assert_holds(newest(tmp_path, comm), tensors(3))
        told = capfd.readouterr().err
        assert "busy" in told and ".step-00000002.removed" in told, told
        assert ".step-00000001.removed" in told, "what could not be removed when a newer one was complete"
        assert_only(comm, tmp_path, "step-00000003", ".step-00000001.removed", ".step-00000002.removed")
        for number, path in busy.items():
            (tmp_path / f".step-0000000{number}.removed").rename(path)


def test_a_limit_on_one_rank_is_told_by_all(comm, tmp_path_all):
    directory, last = tmp_path_all / "c", comm.size - 1
    write(directory, comm, [1])
    writer = Writer(directory, comm)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if comm.rank == last:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        writer.save(2, pieces(comm, 3, 2), {})
        assert_refused(comm, writer.wait, f"rank {last} on", f"rank-{last:05d}-part-00.safetensors: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_only(comm, directory, "step-00000001")
    assert_holds(newest(directory, comm), tensors(1))
    writer.save(3, cut(tensors(3), comm.rank, comm.size), {})
    writer.wait()
    assert_holds(newest(directory, comm), tensors(3))


def test_an_error_reaches_every_rank_at_the_same_poll(comm, tmp_path_all):
    writer = Writer(tmp_path_all / "c", comm)
    writer.save(1, pieces(comm, 1, 1), {})
    if comm.rank == 0:
        (tmp_path_all / "c").rename(tmp_path_all / "elsewhere")
    polls = 0
    with pytest.raises(UserError):  # noqa: PT012 - which call it is, is the question
        while True:
            writer.poll()
            polls += 1
    assert comm.allgather(polls) == [polls] * comm.size


def test_a_directory_removed_while_it_is_written_to(comm, tmp_path_all):
    directory = tmp_path_all / "c"
    writer = Writer(directory, comm)
    writer.save(1, pieces(comm, 1, 1), {})
    if comm.rank == 0:
        (directory / ".step-00000001.partial").rename(tmp_path_all / "elsewhere")
    assert_refused(comm, writer.wait, "rank ", "No such file or directory", "Was it removed?")
    assert_only(comm, directory)


def test_a_directory_removed_between_two_saves(comm, tmp_path_all):
    directory = tmp_path_all / "c"
    writer = Writer(directory, comm)
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(directory)
    assert_refused(comm, lambda: writer.save(1, pieces(comm, 1, 1), {}), "rank 0", str(directory), "No such file")


def test_a_file_of_another_job_is_not_taken_for_ours(comm, tmp_path_all):
    directory = tmp_path_all / "c"
    writer = Writer(directory, comm)
    writer.save(1, pieces(comm, 1, 1), {})
    path = directory / ".step-00000001.partial" / "rank-00000-part-00.safetensors"
    while comm.rank == 0 and not (path.exists() and path.stat().st_size > 1 << 20):
        pass
    if comm.rank == 0:
        os.truncate(path, 99)
    assert_refused(comm, writer.wait, "another process changed its size", str(path))


def test_a_directory_that_cannot_be_made(comm, tmp_path_all):
    if comm.rank == 0:
        (tmp_path_all / "file").touch()
    comm.Barrier()
    assert_refused(comm, lambda: Writer(tmp_path_all / "file" / "c", comm), "file", "Not a directory")


def test_a_read_only_disk(comm, tmp_path_all):
    with small_disk(comm, tmp_path_all / "disk", "size=9m") as disk:
        write(disk / "c", comm, [1])
        writer = Writer(disk / "c", comm)
        comm.Barrier()
        if comm.rank == 0:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        comm.Barrier()
        assert_refused(comm, lambda: writer.save(2, pieces(comm, 1, 2), {}), "Read-only file system", str(disk / "c"))
        assert_holds(newest(disk / "c", comm), tensors(1))


def test_meta_that_json_cannot_hold_is_a_mistake_of_the_program(comm, tmp_path_all):
    writer = Writer(tmp_path_all / "c", comm)
    with pytest.raises(TypeError, match="JSON"):
        writer.save(1, [], {"a": object()})
