"""Loader: slots of the global batch, whoever has them; the thread's errors come out of `batch`."""

import threading
from itertools import pairwise

import numpy as np
import pytest

from mpilm.data.loader import Loader
from mpilm.data.sampler import Sampler
from mpilm.data.shards import Dataset
from tests.data.cases import documents, write_dataset

LENGTH, MICRO = 32, 2


@pytest.fixture
def dataset(tmp_path):
    write_dataset(tmp_path / "tokens", documents(80), shard_tokens=900)
    return Dataset.open(tmp_path / "tokens")


@pytest.fixture
def sampler(dataset):
    return Sampler(dataset.num_sequences(LENGTH), global_batch_size=16, seed=1)


def loader(dataset, sampler, slots, **options):
    return Loader(dataset, sampler, sequence_length=LENGTH, micro_batch_size=MICRO, slots=slots, **options)


def test_a_batch(dataset, sampler):
    with loader(dataset, sampler, range(3, 6)) as loads:
        batch = loads.batch(4)
    ids = sampler.ids(4)[6:12]
    tokens = dataset.read(0, dataset.num_tokens)
    assert batch.inputs.shape == batch.targets.shape == (3, MICRO, LENGTH)
    assert batch.inputs.dtype == batch.targets.dtype == np.int64
    assert batch.documents is None
    for number, sequence in enumerate(ids.tolist()):
        place = divmod(number, MICRO)
        assert np.array_equal(batch.inputs[place], tokens[sequence * LENGTH:(sequence + 1) * LENGTH])
        assert np.array_equal(batch.targets[place], tokens[sequence * LENGTH + 1:(sequence + 1) * LENGTH + 1])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_have_the_same_global_batch(dataset, sampler, ranks):
    cuts = [rank * 8 // ranks for rank in range(ranks + 1)]
    parts = []
    for low, high in pairwise(cuts):
        with loader(dataset, sampler, range(low, high)) as loads:
            parts.append(loads.batch(2).inputs)
    with loader(dataset, sampler, range(8)) as loads:
        assert np.array_equal(np.concatenate(parts), loads.batch(2).inputs)


def test_any_order_of_steps(dataset, sampler):
    """A batch handed out stays what it is while later ones are loaded."""
    with loader(dataset, sampler, range(8)) as loads:
        kept = {step: loads.batch(step) for step in (0, 1, 2, 7, 7, 1)}
    for step, batch in kept.items():
        with loader(dataset, sampler, range(8)) as fresh:
            assert np.array_equal(batch.inputs, fresh.batch(step).inputs)


def test_documents_of_a_row(dataset, sampler):
    with loader(dataset, sampler, range(8), mask_documents=True) as loads:
        batch = loads.batch(0)
    for inputs, numbers in zip(batch.inputs.reshape(-1, LENGTH), batch.documents.reshape(-1, LENGTH), strict=True):
        ends = np.cumsum(inputs == 0)
        assert np.array_equal(numbers, np.concatenate([[0], ends[:-1]]))


class Failing:
    """An order that is damaged from a certain step on."""

    def __init__(self, order, step):
        self.order, self.step = order, step

    def ids(self, step):
        if step >= self.step:
            raise OSError(f"step {step} cannot be read")
        return self.order.ids(step)


def test_the_threads_error_comes_out_of_batch(dataset, sampler):
    with loader(dataset, Failing(sampler, 2), range(8)) as loads:
        loads.batch(0)
        loads.batch(1)  # its thread has failed at step 2 by now, which is no harm to step 1
        with pytest.raises(OSError, match="step 2 cannot be read"):
            loads.batch(2)
        assert loads.batch(0).inputs.shape == (8, MICRO, LENGTH)


def test_close_ends_the_thread(dataset, sampler):
    loads = loader(dataset, sampler, range(8))
    loads.batch(0)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    loads.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_an_idle_rank(dataset, sampler):
    with loader(dataset, sampler, range(4, 4)) as loads:
        assert loads.batch(0).inputs.shape == (0, MICRO, LENGTH)
