"""Whatever happens to the files: it is named and the checkpoint before is taken, or it makes no difference."""

from __future__ import annotations

import os
import random
import resource
import shutil

import pytest

from mpilm.checkpoint import Alone, DamagedError, Reader, newest, verified
from mpilm.checkpoint.newest import share
from mpilm.log import UserError
from tests.chaos.damage import DAMAGE, flip
from tests.checkpoint_cases import assert_holds, tensors, write


@pytest.mark.turns(at=(1, 3, 4))
@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("which", ["manifest.json", "first", "last"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(comm, tmp_path_all, what, which):
    directory = tmp_path_all / "c"
    write(directory, comm, [1, 2], file_bytes=300)
    path = directory / "step-00000002"
    comm.Barrier()
    if comm.rank == 0:
        files = sorted(path.glob("*.safetensors"))
        victim = path / which if which == "manifest.json" else files[{"first": 0, "last": -1}[which]]
        DAMAGE[what](victim, [file for file in files if file != victim])
    comm.Barrier()
    told = []
    reader = newest(directory, comm, tell=told.append)
    assert reader.step == 1
    assert_holds(reader, tensors(1))
    assert len(told) == 1
    assert str(path) in told[0]
    with pytest.raises(DamagedError):
        verified(path, comm)


def test_a_step_in_the_place_of_another_is_named(comm, tmp_path_all):
    directory = tmp_path_all / "c"
    write(directory, comm, [1, 2])
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(directory / "step-00000002")
        shutil.copytree(directory / "step-00000001", directory / "step-00000002")
        shutil.copytree(directory / "step-00000001", directory / "best")
    comm.Barrier()
    told = []
    assert newest(directory, comm, tell=told.append).step == 1
    assert "is of step 1" in told[0]
    assert verified(directory / "best", comm).step == 1, "a copy under a name of one's own is fine"


def test_none_good_is_an_error_that_names_all(comm, tmp_path_all):
    directory = tmp_path_all / "c"
    write(directory, comm, [1, 2])
    comm.Barrier()
    if comm.rank == 0:
        for path in directory.iterdir():
            (path / "manifest.json").unlink()
    comm.Barrier()
    with pytest.raises(UserError, match=r"none of the 2 (.|\n)*step-00000002(.|\n)*step-00000001"):
        newest(directory, comm, tell=lambda text: None)


@pytest.mark.serial
def test_no_flipped_bit_goes_unseen(comm, tmp_path_all):
    directory = tmp_path_all / "c"
    write(directory, comm, [1], file_bytes=1000)
    path = directory / "step-00000001"
    rng = random.Random(0)
    unseen, named, tried = set(), 0, 0
    for file in path.iterdir():
        size = file.stat().st_size
        for bit in {0, 8 * size - 1, *(rng.randrange(8 * size) for _ in range(150))}:
            flip(file, bit)
            try:
                assert_holds(verified(path, Alone()), tensors(1))
                unseen.add(file.name)
            except UserError as error:
                named += path.name in str(error)
            flip(file, bit)
            tried += 1
    assert_holds(verified(path, Alone()), tensors(1))
    assert unseen <= {"manifest.json"}, "only blanks between its words may change"
    assert named > 0.9 * tried


def test_damage_after_the_verification_is_named_too(comm, tmp_path_all):
    directory = tmp_path_all / "c"
    write(directory, comm, [1])
    reader = newest(directory, comm)
    comm.Barrier()
    if comm.rank == 0:
        for file in (directory / "step-00000001").glob("*.safetensors"):
            os.truncate(file, 20)
    comm.Barrier()
    for name, array in tensors(1).items():
        with pytest.raises(DamagedError, match=r"has 20 bytes instead of"):
            reader.read(name, 0, array.size)


def test_what_a_rank_cannot_read_now_is_no_damage(comm, tmp_path_all):
    """It may open no more files; an older checkpoint would be no remedy."""
    directory = tmp_path_all / "c"
    write(directory, comm, [1, 2])
    comm.Barrier()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if comm.rank == comm.size - 1:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(UserError, match=r"(?s)can't be read on .*Too many open files") as told:
            verified(directory / "step-00000002", comm) if comm.size > 1 else Reader(directory / "step-00000002")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not isinstance(told.value, DamagedError)
    assert newest(directory, comm).step == 2


class Meanwhile(Alone):
    """A program that is told of a checkpoint, which a run that goes on then removes, after it has saved another."""

    def __init__(self, directory):
        self.directory, self.told = directory, 0

    def bcast(self, value):
        self.told += 1
        if self.told == 1:
            shutil.move(self.directory / "elsewhere", self.directory / "step-00000003")
            shutil.rmtree(self.directory / "step-00000002")
        return value


@pytest.mark.serial
def test_a_checkpoint_that_is_removed_meanwhile_is_no_damage(comm, tmp_path):
    write(tmp_path, comm, [2, 3])
    shutil.move(tmp_path / "step-00000003", tmp_path / "elsewhere")
    told = []
    assert newest(tmp_path, Meanwhile(tmp_path), tell=told.append).step == 3
    assert not told


def test_a_tensor_that_is_not_there_is_named(comm, tmp_path_all):
    write(tmp_path_all / "c", comm, [1])
    with pytest.raises(UserError, match=r"no tensor model\.head.*adam_m"):
        newest(tmp_path_all / "c", comm).read("model.head", 0, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_file_is_verified_by_one_rank(size):
    rng = random.Random(size)
    sizes = {f"f{number}": rng.randrange(100) for number in range(20)}
    shares = [share(sizes, rank, size) for rank in range(size)]
    assert sorted(name for mine in shares for name in mine) == sorted(sizes)
    loads = [sum(sizes[name] for name in mine) for mine in shares]
    assert max(loads) - min(loads) <= max(sizes.values())
