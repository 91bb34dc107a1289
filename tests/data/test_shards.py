"""Dataset: what was written is what is read, wherever shards end."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.data.shards import Dataset, unigram_entropy
from mpilm.log import UserError
from tests.data.cases import documents, write_dataset

pytestmark = pytest.mark.serial


@pytest.fixture
def texts():
    return documents(60)


@pytest.fixture
def dataset(tmp_path, texts):
    write_dataset(tmp_path / "tokens", texts, shard_tokens=700, validation=documents(5, seed=1))
    return Dataset.open(tmp_path / "tokens")


def test_reads_what_was_written(dataset, texts):
    tokens = np.concatenate(texts)
    assert dataset.num_tokens == tokens.size
    assert dataset.num_documents == 60
    assert dataset.dtype == np.uint16
    assert len(dataset.shards) > 5
    assert np.array_equal(dataset.read(0, tokens.size), tokens)
    for start, count in ((0, 0), (699, 1), (699, 2), (700, 700), (690, 1500), (tokens.size, 0), (tokens.size - 1, 1)):
        assert np.array_equal(dataset.read(start, count), tokens[start:start + count])


def test_windows(dataset, texts):
    tokens = np.concatenate(texts)
    for starts in ([], [0], [0, 10, 20], [690, 5, 1399, 700, 0], [tokens.size - 33]):
        rows = dataset.windows(starts, 33)
        assert rows.dtype == np.int64
        assert np.array_equal(rows, np.array([tokens[start:start + 33] for start in starts]).reshape(-1, 33))
    longer_than_a_shard = dataset.windows([0, 300], 1500)
    assert np.array_equal(longer_than_a_shard[1], tokens[300:1800])


def test_a_mapping_is_not_copied(dataset):
    assert not dataset.read(10, 100).flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        dataset.read(10, 100)[0] = 1


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 10**9), (10**9, 1), (5, -1)])
def test_outside(dataset, start, count):
    with pytest.raises(IndexError):
        dataset.read(start, count)
    with pytest.raises(IndexError):
        dataset.documents(start, count)


def test_windows_outside(dataset):
    with pytest.raises(IndexError):
        dataset.windows([0, dataset.num_tokens - 9], 10)


def test_documents(dataset, texts):
    numbers = np.repeat(np.arange(60), [text.size for text in texts])
    assert np.array_equal(dataset.documents(0, dataset.num_tokens), numbers)
    for start, count in ((0, 1), (695, 30), (1400, 1), (123, 2000)):
        assert np.array_equal(dataset.documents(start, count), numbers[start:start + count])


def test_a_document_longer_than_shards(tmp_path):
    long = np.append(np.full(4999, 7), 0)
    write_dataset(tmp_path, [np.array([1, 0]), long, np.array([2, 3, 0])], shard_tokens=1000)
    data = Dataset.open(tmp_path)
    assert np.array_equal(data.documents(0, data.num_tokens), np.repeat([0, 1, 2], [2, 5000, 3]))


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9), shard_tokens=st.integers(10, 60), data=st.data())
def test_any_shape(tmp_path_factory, lengths, shard_tokens, data):
    texts = [np.append(np.full(length, number + 1), 0) for number, length in enumerate(lengths)]
    folder = tmp_path_factory.mktemp("tokens")
    tokens = write_dataset(folder, texts, shard_tokens=shard_tokens)
    read = Dataset.open(folder)
    start = data.draw(st.integers(0, tokens.size - 1))
    count = data.draw(st.integers(1, tokens.size - start))
    assert np.array_equal(read.read(start, count), tokens[start:start + count])
    assert np.array_equal(read.windows([start], count)[0], tokens[start:start + count])
    numbers = np.repeat(np.arange(len(texts)), [text.size for text in texts])
    assert np.array_equal(read.documents(start, count), numbers[start:start + count])


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    tokens = write_dataset(tmp_path, documents(10, vocab_size=100_000), vocab_size=100_000)
    data = Dataset.open(tmp_path)
    assert data.dtype == np.uint32
    assert np.array_equal(data.read(0, data.num_tokens), tokens)


def test_an_empty_split(tmp_path):
    write_dataset(tmp_path, documents(3))
    empty = Dataset.open(tmp_path, split="validation")
    assert empty.num_tokens == empty.num_documents == 0
    assert empty.read(0, 0).size == 0
    assert math.isnan(unigram_entropy(empty))
    with pytest.raises(UserError, match="validation split has 0 tokens"):
        empty.num_sequences(16)


def test_num_sequences(dataset):
    assert dataset.num_sequences(dataset.num_tokens - 1) == 1
    assert dataset.num_sequences(16) == (dataset.num_tokens - 1) // 16
    with pytest.raises(UserError, match=r"--data\.sequence_length"):
        dataset.num_sequences(dataset.num_tokens)


def test_no_such_split(tmp_path):
    write_dataset(tmp_path, documents(3))
    with pytest.raises(ValueError, match="train, validation"):
        Dataset.open(tmp_path, split="test")


def test_the_fingerprint_names_the_tokens(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_dataset(tmp_path / name, documents(3, seed=seed))
    a, b, c = (Dataset.open(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_unigram_entropy(tmp_path):
    write_dataset(tmp_path, [np.array([1, 2, 3, 0] * 5000)])
    data = Dataset.open(tmp_path)
    assert unigram_entropy(data) == pytest.approx(math.log(4))
    assert unigram_entropy(data, limit=1) == 0
