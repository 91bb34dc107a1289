"""The sampler: every sequence once per epoch, any step at once, the same for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.data.sampler import Sampler, Spread

pytestmark = pytest.mark.serial


def epochs(sampler, count):
    """The ids of the first steps that make up `count` epochs, one row an epoch."""
    needed = count * sampler.num_sequences
    steps = -(-needed // sampler.global_batch_size)
    ids = np.concatenate([sampler.ids(step) for step in range(steps)])
    return ids[:needed].reshape(count, sampler.num_sequences)


@given(num_sequences=st.integers(1, 3000), global_batch_size=st.integers(1, 300), seed=st.integers(0, 2**70))
def test_every_sequence_once_per_epoch(num_sequences, global_batch_size, seed):
    sampler = Sampler(num_sequences, global_batch_size=global_batch_size, seed=seed)
    steps = -(-2 * num_sequences // global_batch_size)
    if steps > 300:
        return
    for epoch in epochs(sampler, 2):
        assert np.array_equal(np.sort(epoch), np.arange(num_sequences))


@given(num_sequences=st.integers(1, 10**15), global_batch_size=st.integers(1, 64), step=st.integers(0, 10**12))
def test_any_step_at_once(num_sequences, global_batch_size, step):
    ids = Sampler(num_sequences, global_batch_size=global_batch_size, seed=7).ids(step)
    assert ids.dtype == np.int64 and ids.shape == (global_batch_size,)
    assert ids.min() >= 0 and ids.max() < num_sequences


def test_steps_are_cuts_of_one_stream():
    """The global batch size cuts the order, it does not change it."""
    small, large = (Sampler(1000, global_batch_size=size, seed=5) for size in (7, 70))
    assert np.array_equal(np.concatenate([small.ids(step) for step in range(30, 40)]), large.ids(3))


def test_a_step_may_straddle_epochs():
    sampler = Sampler(10, global_batch_size=25, seed=1)
    ids = sampler.ids(0)
    assert sorted(ids[:10]) == sorted(ids[10:20]) == list(range(10))
    assert len(set(ids[20:])) == 5


def test_epochs_and_seeds_differ():
    first, second = epochs(Sampler(1000, global_batch_size=1000, seed=1), 2)
    other = Sampler(1000, global_batch_size=1000, seed=2).ids(0)
    for one, two in ((first, second), (first, other), (first, np.arange(1000))):
        assert np.count_nonzero(one == two) < 12  # of 1000 places about one agrees by chance


@pytest.mark.parametrize("num_sequences", [3, 10, 33, 64])
def test_every_place_is_as_likely(num_sequences):
    count = 4000
    orders = epochs(Sampler(num_sequences, global_batch_size=num_sequences * 100, seed=3), count)
    expected = count / num_sequences
    for place in range(num_sequences):
        seen = np.bincount(orders[:, place], minlength=num_sequences)
        chi_square = ((seen - expected) ** 2 / expected).sum() / (num_sequences - 1)
        assert chi_square < 4


def test_the_order_stays_what_it_is():
    """Resumed runs and other people's results depend on it."""
    assert Sampler(1000, global_batch_size=8, seed=1).ids(0).tolist() == [583, 336, 996, 791, 811, 843, 237, 695]
    large = Sampler(10**12, global_batch_size=3, seed=42).ids(10**9)
    assert large.tolist() == [919476744313, 883586748681, 338696645420]


def test_spread():
    spread = Spread(100, count=5)
    assert spread.ids(0).tolist() == spread.ids(7).tolist() == [0, 20, 40, 60, 80]
    assert Spread(3, count=3).ids(0).tolist() == [0, 1, 2]


def test_spread_in_steps():
    """The steps of every rank together are the whole."""
    runs = [range(4), range(4, 9)]
    pieces = [Spread(100, count=9, mine=mine, a_step=2).ids(step) for mine in runs for step in range(4)]
    assert [len(piece) for piece in pieces] == [2, 2, 0, 0, 2, 2, 1, 0]
    assert np.concatenate(pieces).tolist() == Spread(100, count=9).ids(0).tolist()


def test_nothing_to_sample():
    with pytest.raises(ValueError, match="num_sequences 0"):
        Sampler(0, global_batch_size=1, seed=1)
