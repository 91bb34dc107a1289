"""The built-in corpus: real text that is there on every machine, made once."""

from pathlib import Path

import pytest

from data_prep import corpus
from data_prep._parts import split_of
from data_prep._readers import key_of
from mpilm.data.shards import Dataset, unigram_entropy
from mpilm.log import UserError
from tests.helpers import everywhere


@pytest.mark.slow
def test_prepared_once_by_all_ranks(comm, tmp_path_all):
    """From a part of the library here, to be quick; `make train` makes the whole."""
    files = [path for path in corpus.library() if path.parent.name in ("json", "email", "asyncio")]
    folder = corpus.prepare(tmp_path_all / "corpus", comm, files=files)
    train = Dataset.open(folder)
    everywhere(comm, train.num_tokens > 50_000 and train.vocab_size == 8192, "sizes")
    everywhere(comm, 3 < unigram_entropy(train) < 8, "entropy")
    before = (folder / "index.json").stat().st_mtime_ns
    again = corpus.prepare(tmp_path_all / "corpus", comm, files=files)
    everywhere(comm, again == folder and (folder / "index.json").stat().st_mtime_ns == before, "made again")


@pytest.mark.slow
def test_a_damaged_one_is_named(comm, tmp_path_all):
    files = [path for path in corpus.library() if path.parent.name in ("json", "email")]
    folder = corpus.prepare(tmp_path_all / "corpus", comm, files=files)
    comm.Barrier()
    if comm.rank == 0:
        next(folder.glob("train*")).write_bytes(b"")
    comm.Barrier()
    with pytest.raises(UserError, match=r"train-00000\.h5"):
        corpus.prepare(tmp_path_all / "corpus", comm, files=files)


@pytest.mark.serial
def test_the_library():
    files = corpus.library()
    assert sum(path.stat().st_size for path in files) > 10e6
    assert not [path for path in files if "site-packages" in path.parts]
    assert files == sorted(files)


@pytest.mark.serial
def test_the_validation_split_is_a_sensible_share_of_the_library():
    """Enough documents that its loss means something, and few enough to learn from the rest."""
    sizes = [(path.stat().st_size, split_of(key_of(path.read_bytes()), corpus.VALIDATION))
             for path in corpus.library() if path.stat().st_size]
    mine = [size for size, split in sizes if split == "validation"]
    assert len(mine) >= 20
    assert 0.03 < sum(mine) / sum(size for size, _ in sizes) < 0.08


@pytest.mark.serial
def test_an_interpreter_without_source(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"--data\.path"):
        corpus.library()


def test_a_folder_that_cannot_be_made(comm, tmp_path_all):
    if comm.rank == 0:
        Path(tmp_path_all / "file").write_text("")
    comm.Barrier()
    with pytest.raises(UserError, match="Name a folder"):
        corpus.prepare(tmp_path_all / "file" / "corpus", comm, files=[Path(__file__)])
