"""Every token is looked at before the first step, each by one rank, and once as long as its file stays as it is."""

import json
import os

import h5py
import pytest

from mpilm.data import scan
from mpilm.data.shards import Dataset
from mpilm.log import UserError
from mpilm.progress import Work
from tests.data.cases import documents, write_dataset
from tests.helpers import everywhere

VOCAB_SIZE = 300


@pytest.fixture
def folder(comm, tmp_path_all):
    if comm.rank == 0:
        write_dataset(tmp_path_all / "tokens", documents(40), shard_tokens=1000, vocab_size=VOCAB_SIZE,
                      validation=documents(9, seed=1))
    comm.Barrier()
    return tmp_path_all / "tokens"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(scan, "PIECE_TOKENS", 37)


def splits(folder):
    return [Dataset.open(folder, split=split) for split in ("train", "validation")]


def looked_at(folder, comm, run):
    """Bytes that all ranks read."""
    before = Work.done
    scan.scan(splits(folder), comm, run)
    return sum(comm.allgather(Work.done - before))


def change(comm, path, place, token):
    """By one rank, between two steps of all."""
    comm.Barrier()
    if comm.rank == 0:
        with h5py.File(path, "r+", locking=False) as file:
            file["tokens"][place] = token
    comm.Barrier()


@pytest.mark.parametrize(("file", "place"), [("train-00000.h5", 0), ("train-00001.h5", 36), ("train-00002.h5", 999),
                                             ("train-00003.h5", -1), ("validation-00000.h5", 500)])
def test_a_token_beyond_the_vocabulary_is_found_wherever_it_is(folder, comm, tmp_path_all, file, place):
    """On all ranks, though one of them reads it, and it is not remembered as good."""
    good = (folder / file).stat().st_mtime_ns
    change(comm, folder / file, place, VOCAB_SIZE)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{file}: holds token {VOCAB_SIZE}, but .* Copy the file again") as caught:
            scan.scan(splits(folder), comm, tmp_path_all)
        everywhere(comm, len(set(comm.allgather(str(caught.value)))) == 1)
    change(comm, folder / file, place, VOCAB_SIZE - 1)
    assert (folder / file).stat().st_mtime_ns != good
    scan.scan(splits(folder), comm, tmp_path_all)


def test_every_token_once(folder, comm, tmp_path_all):
    """And no more, until a file is another."""
    everything = splits(folder)
    total = sum(split.num_tokens * split.dtype.itemsize for split in everything)
    assert looked_at(folder, comm, tmp_path_all) == total
    assert looked_at(folder, comm, tmp_path_all) == 0
    path = folder / "train-00001.h5"
    os.utime(path, ns=(1, 1)) if comm.rank == 0 else None
    comm.Barrier()
    assert looked_at(folder, comm, tmp_path_all) == 1000 * everything[0].dtype.itemsize


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"x": 3}', b"\xff"])
def test_what_it_remembers_may_be_damaged(folder, comm, tmp_path_all, content):
    """Then everything is read again."""
    everything = looked_at(folder, comm, tmp_path_all)
    if comm.rank == 0:
        (tmp_path_all / scan.FILE).write_bytes(content)
    comm.Barrier()
    assert looked_at(folder, comm, tmp_path_all) == everything
    assert len(json.loads((tmp_path_all / scan.FILE).read_bytes())) >= len(splits(folder)[0].shards)


def test_a_file_that_becomes_shorter_meanwhile(folder, comm, tmp_path_all):
    """It was whole when it was opened."""
    opened = splits(folder)
    comm.Barrier()
    if comm.rank == 0:
        os.truncate(folder / "train-00002.h5", opened[0].shards[2].begin + 100)
    comm.Barrier()
    with pytest.raises(UserError, match=r"train-00002.h5: ends before its last token"):
        scan.scan(opened, comm, tmp_path_all)
