"""verify finds any flipped byte and names the file; what is whole passes."""

from dataclasses import replace
from hashlib import sha256

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from data_prep.verify import verify
from mpilm.data import _format
from mpilm.data._files import file_sha256
from mpilm.log import UserError
from tests.data.cases import documents, write_dataset
from tests.helpers import everywhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_dataset(folder, documents(30), shard_tokens=1000, validation=documents(4, seed=1))
    return folder


def test_a_whole_one(folder):
    told = verify(folder, MPI.COMM_SELF)
    assert "all as written" in told
    assert _format.read_index(folder).fingerprint in told


@pytest.mark.slow
@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_anywhere(folder, data):
    name = data.draw(st.sampled_from(["train-00000.h5", "train-00002.h5", "validation-00000.h5", "tokenizer.json"]))
    content = (folder / name).read_bytes()
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    (folder / name).write_bytes(damaged)
    try:
        with pytest.raises(UserError, match=name):
            verify(folder, MPI.COMM_SELF)
    finally:
        (folder / name).write_bytes(content)


@settings(max_examples=60)
@given(data=st.data())
def test_a_changed_index(folder, data):
    """A change of index.json that means anything is found."""
    content = (folder / "index.json").read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    damaged[place] = data.draw(st.integers(32, 126))
    (folder / "index.json").write_bytes(damaged)
    try:
        if damaged.split() != content.split():
            with pytest.raises(UserError, match=r"index\.json"):
                verify(folder, MPI.COMM_SELF)
    finally:
        (folder / "index.json").write_bytes(content)


def rewrite(folder, name, change, *, checksum):
    """Change a shard so that all checksums fit again."""
    with h5py.File(folder / name, "r+", locking=False) as file:
        change(file)
        if checksum:
            content = file["tokens"][:].tobytes() + file["documents"][:].tobytes()
            file.attrs["checksum"] = np.bytes_(sha256(content).hexdigest())
    index = _format.read_index(folder)
    shards = [replace(shard, sha256=file_sha256(folder / name)) if shard.file == name else shard
              for shard in index.splits["train"]]
    index = replace(index, splits={**index.splits, "train": shards})
    (folder / "index.json").write_bytes(index.to_bytes())


@pytest.mark.parametrize(("change", "words"), [
    (lambda file: file["tokens"].__setitem__(5, 299), "largest token"),
    (lambda file: file["tokens"].__setitem__(file["documents"][3] - 1, 1), "does not end with the end-of-text token"),
    (lambda file: file["documents"].__setitem__(2, 0), "offsets are not in order"),
])
def test_checksums_that_fit_do_not_hide_nonsense(tmp_path, change, words):
    write_dataset(tmp_path, [np.array([1, 2, 3, 0])] * 10)
    rewrite(tmp_path, "train-00000.h5", change, checksum=True)
    with pytest.raises(UserError, match=rf"train-00000\.h5: .*{words}"):
        verify(tmp_path, MPI.COMM_SELF)


def test_a_shard_has_a_checksum_of_its_own(tmp_path):
    write_dataset(tmp_path, [np.array([1, 2, 3, 0])] * 10)
    rewrite(tmp_path, "train-00000.h5", lambda file: file["tokens"].__setitem__(5, 1), checksum=False)
    with pytest.raises(UserError, match=r"train-00000\.h5: .*`checksum` attribute"):
        verify(tmp_path, MPI.COMM_SELF)


def test_every_damaged_file_is_named_on_every_rank(comm, tmp_path_all):
    folder = tmp_path_all / "tokens"
    if comm.rank == 0:
        write_dataset(folder, documents(60), shard_tokens=1000)
        (folder / "train-00001.h5").write_bytes(b"")
        (folder / "train-00003.h5").unlink()
        (folder / "tokenizer.json").write_bytes(b"x")
    comm.Barrier()
    with pytest.raises(UserError) as caught:
        verify(folder, comm)
    lines = str(caught.value).splitlines()
    named = [name in line for name, line in zip(("tokenizer.json", "train-00001.h5", "train-00003.h5"), lines,
                                                strict=True)]
    everywhere(comm, all(named), str(caught.value))


@pytest.mark.serial
def test_as_a_program(tmp_path, run_mpi):
    write_dataset(tmp_path / "tokens", documents(30), shard_tokens=1000)
    assert "all as written" in run_mpi(0, ["-m", "data_prep.verify", str(tmp_path / "tokens")]).stdout
    path = tmp_path / "tokens" / "train-00002.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for ranks in (0, 2):
        result = run_mpi(ranks, ["-m", "data_prep.verify", str(tmp_path / "tokens")])
        assert result.rc == 2
        assert "train-00002.h5" in result.stderr
        assert "Traceback" not in result.stderr
