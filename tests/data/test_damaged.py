"""Whatever is wrong with a dataset is said before the first step, by file and with what to do about it."""

import gc
import json
import os
import resource
import shutil

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.data import _format
from mpilm.data.shards import Dataset, unigram_entropy
from mpilm.log import UserError
from tests.data.cases import documents, write_dataset

pytestmark = pytest.mark.serial


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path / "tokens", documents(40), shard_tokens=1000)
    return tmp_path / "tokens"


def refused(folder, *words):
    """Opening fails with a message that has all these words."""
    with pytest.raises(UserError) as caught:
        Dataset.open(folder)
    for word in words:
        assert word in str(caught.value)


def change_index(folder, change, *, keep_fingerprint=False):
    """Apply a change to the index and, unless told otherwise, make its fingerprint fit again."""
    path = folder / "index.json"
    values = json.loads(path.read_text())
    change(values)
    if not keep_fingerprint:
        body = {key: value for key, value in values.items() if key != "fingerprint"}
        values["fingerprint"] = _format.hashlib.sha256(_format._canonical(body)).hexdigest()
    path.write_text(json.dumps(values))


def change_attribute(folder, name, value):
    """Change an attribute of the second shard, and its size in the index along with it."""
    path = folder / "train-00001.h5"
    with h5py.File(path, "r+", locking=False) as file:
        if value is None:
            del file.attrs[name]
        else:
            file.attrs[name] = value
    change_index(folder, lambda values: values["splits"]["train"][1].update(bytes=path.stat().st_size))


@pytest.mark.parametrize("left", [0, 4096, 4100, 5000])
@pytest.mark.parametrize("method", ["windows", "read", "documents"])
def test_cut_short_while_it_is_read(folder, method, left):
    """No SIGBUS, no zeros instead of tokens: an error that names the shard."""
    data = Dataset.open(folder)
    use = {"windows": lambda: data.windows([1990, 10], 20), "read": lambda: data.read(1990, 20),
           "documents": lambda: data.documents(1990, 20)}[method]
    use()
    os.truncate(folder / "train-00001.h5", left)
    with pytest.raises(UserError, match=r"train-00001.h5: was changed while it was being read: .*Copy the file again"):
        use()
    assert data.windows([10, 20], 20).shape == (2, 20), "another shard is as good as before"


def test_a_token_beyond_the_vocabulary_is_named_by_the_entropy_too(folder):
    path = folder / "train-00000.h5"
    with h5py.File(path, "r+", locking=False) as file:
        file["tokens"][700] = 301
    with pytest.raises(UserError, match=r"train-00000.h5: holds token 301"):
        unigram_entropy(Dataset.open(folder))


def limit_with(free):
    """The largest limit of open files under which so many more can be opened; they get the lowest free numbers."""
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    limit = max(taken) + 1
    while (left := limit - sum(number < limit for number in taken)) != free:
        limit += 1 if left < free else -1
    return limit


def test_as_many_shards_as_files_may_be_open(folder):
    """A shard takes one open file; too many are refused with the remedy."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()
    number = len(list(folder.glob("train-*")))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit_with(number + 3), hard))
        data = Dataset.open(folder)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit_with(2), hard))
        with pytest.raises(UserError, match=r"Too many open files.*ulimit -n"):
            Dataset.open(folder)
        assert len(data.shards) == number > 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such folder", "data_prep.encode")


def test_no_dataset(tmp_path):
    refused(tmp_path, "holds no dataset", "data_prep.encode")


def test_an_unfinished_one(tmp_path):
    (tmp_path / "unfinished").mkdir()
    refused(tmp_path, "not finished", "again")


def test_a_missing_shard(folder):
    (folder / "train-00002.h5").unlink()
    refused(folder, "train-00002.h5", "No such file", "Copy the whole folder")


@pytest.mark.parametrize("size", [0, 100, 2000])
def test_a_truncated_shard(folder, size):
    with open(folder / "train-00001.h5", "r+b") as file:
        file.truncate(size)
    refused(folder, "train-00001.h5", "truncated")


def test_a_shard_that_grew(folder):
    with open(folder / "train-00001.h5", "ab") as file:
        file.write(b"more")
    refused(folder, "train-00001.h5", "too long")


def test_a_shard_that_is_something_else(folder):
    path = folder / "train-00001.h5"
    path.write_bytes(b"x" * path.stat().st_size)
    refused(folder, "train-00001.h5", "not a shard")


def test_another_datasets_shard(folder, tmp_path):
    write_dataset(tmp_path / "other", documents(40, seed=9), shard_tokens=1000)
    shutil.copy(tmp_path / "other" / "train-00002.h5", folder / "train-00001.h5")
    change_index(folder, lambda values: values["splits"]["train"][1].update(
        bytes=(folder / "train-00001.h5").stat().st_size))
    refused(folder, "train-00001.h5", "belongs to another dataset")


@pytest.mark.parametrize(("name", "value", "words"), [
    ("version", np.int64(2), ("format version 2", "reads version 1", "Update mpilm")),
    ("version", None, ("format version None",)),
    ("format", b"llm-tokens", ("not an mpilm shard",)),
    ("tokenizer_sha256", b"0" * 64, ("belongs to another dataset", "tokenizer_sha256")),
    ("vocab_size", np.int64(5), ("its vocab_size is 5, the index says 300",)),
    ("num_tokens", None, ("num_tokens",)),
    ("max_token", np.arange(1000), ("not a shard that can be read",)),
    ("split", np.bytes_(b"x" * 5000), ("not a shard that can be read",)),
    ("split", "x" * 5000, ("belongs to another dataset",)),
])
def test_attributes(folder, name, value, words):
    change_attribute(folder, name, value)
    refused(folder, "train-00001.h5", *words)


def test_a_token_outside_the_vocabulary(tmp_path):
    """Known from the attributes alone: no pass over the tokens."""
    write_dataset(tmp_path, [np.array([1, 2, 300, 0])], vocab_size=300)
    refused(tmp_path, "train-00000.h5", "token 300", "vocabulary has 300")


def test_a_token_damaged_later_is_named_when_read(folder):
    with h5py.File(folder / "train-00001.h5", "r+", locking=False) as file:
        file["tokens"][17] = 40_000
    data = Dataset.open(folder)
    data.windows([0], 1000)
    with pytest.raises(UserError, match=r"train-00001\.h5: holds token 40000.*verify"):
        data.windows([0, 1010], 20)


def test_document_offsets_out_of_order(folder):
    with h5py.File(folder / "train-00001.h5", "r+", locking=False) as file:
        file["documents"][:] = file["documents"][:][::-1]
    data = Dataset.open(folder)
    with pytest.raises(UserError, match=r"train-00001\.h5: its document offsets"):
        data.documents(0, data.num_tokens)


def test_arrays_that_cannot_be_mapped(folder):
    path = folder / "train-00001.h5"
    with h5py.File(path, "r+", locking=False) as file:
        tokens = file["tokens"][:]
        del file["tokens"]
        file.create_dataset("tokens", data=tokens, chunks=(100,), compression="gzip")
    change_index(folder, lambda values: values["splits"]["train"][1].update(bytes=path.stat().st_size))
    refused(folder, "train-00001.h5", "not stored in one piece")


def test_a_link_to_another_file(folder, tmp_path):
    path = folder / "train-00001.h5"
    shutil.copy(path, tmp_path / "elsewhere.h5")
    with h5py.File(path, "r+", locking=False) as file:
        del file["tokens"]
        file["tokens"] = h5py.ExternalLink(tmp_path / "elsewhere.h5", "tokens")
    change_index(folder, lambda values: values["splits"]["train"][1].update(bytes=path.stat().st_size))
    refused(folder, "train-00001.h5", "no dataset tokens")


def test_another_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"other": 1}')
    refused(folder, "tokenizer.json", "not the tokenizer that encoded")


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json", "Copy the tokenizer")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, "\x00\xff", "1e999999", '{"format": "x"}'])
def test_not_an_index(folder, text):
    (folder / "index.json").write_text(text)
    refused(folder, "index.json")


def test_a_newer_index(folder):
    change_index(folder, lambda values: values.update(version=2))
    refused(folder, "index.json", "version 2", "reads version 1")


def test_a_changed_index(folder):
    change_index(folder, lambda values: values["splits"]["train"].pop(), keep_fingerprint=True)
    refused(folder, "index.json", "fingerprint")


@pytest.mark.parametrize("name", ["../train-00001.h5", "/etc/passwd", "sub/train-00001.h5", "train-00000.h5", "", 5])
def test_a_path_in_the_index_cannot_leave_the_folder(folder, name):
    change_index(folder, lambda values: values["splits"]["train"][1].update(file=name))
    refused(folder, "index.json", "must be named train-00001.h5")


@pytest.mark.parametrize("change", [
    {"num_tokens": 10**18}, {"num_tokens": 2**70}, {"num_tokens": -1}, {"num_tokens": 1.5}, {"num_tokens": True},
    {"num_tokens": None}, {"num_documents": 10**18}, {"bytes": 10**18}, {"sha256": "x"}, {"max_token": 10**10},
])
def test_sizes_are_checked_before_memory_is_taken(folder, change):
    change_index(folder, lambda values: values["splits"]["train"][1].update(change))
    refused(folder)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)
KEYS = ["format", "version", "vocab_size", "end_of_text", "tokenizer_sha256", "splits", "dtype", "fingerprint"]


@given(key=st.sampled_from(KEYS), value=VALUES)
def test_fuzzed_index(tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("tokens")
    write_dataset(folder, documents(2))
    before = json.loads((folder / "index.json").read_text())[key]
    change_index(folder, lambda values: values.update({key: value}))
    if value == before and type(value) is type(before):
        Dataset.open(folder)
    elif key not in ("dtype", "fingerprint"):  # these two follow from the others and are put right above
        refused(folder)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Bytes of a small shard, and its folder to damage again and again."""
    folder = tmp_path_factory.mktemp("tokens")
    write_dataset(folder, documents(4))
    return folder, (folder / "train-00000.h5").read_bytes()


@settings(max_examples=150)
@given(data=st.data())
def test_fuzzed_shard(pristine, data):
    """Any bytes of a shard changed: it opens, or a UserError names it. Never another error, never a crash."""
    folder, content = pristine
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    (folder / "train-00000.h5").write_bytes(damaged)
    complaint = "train-00000.h5"
    try:
        read = Dataset.open(folder)
        read.windows([0], read.num_tokens)
        read.documents(0, read.num_tokens)
    except UserError as error:
        complaint = str(error)
    assert "train-00000.h5" in complaint
