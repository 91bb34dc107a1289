"""Units dealt to stages: none lost, the most expensive stage as cheap as it can be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.log import UserError
from mpilm.model import count
from mpilm.model.shape import Shape
from mpilm.parallel import partition

pytestmark = pytest.mark.serial
SHAPE = Shape(layers=6, width=64, heads=4, vocab_size=500)


def largest(costs, runs):
    """The cost of the most expensive stage."""
    return max(sum(costs[unit] for unit in run) for run in runs)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 9))
def test_no_other_way_to_cut_is_better(costs, stages):
    """Compared with every way there is."""
    stages = min(stages, len(costs))
    runs = partition.cheapest(costs, stages)
    assert len(runs) == stages and all(map(len, runs))
    assert [unit for run in runs for unit in run] == list(range(len(costs)))
    every = ([range(low, high) for low, high in pairwise((0, *cuts, len(costs)))]
             for cuts in combinations(range(1, len(costs)), stages - 1))
    assert largest(costs, runs) == min(largest(costs, other) for other in every)


def test_a_long_vocabulary_leaves_the_last_stage_fewer_blocks():
    """The head weighs as much as some blocks."""
    shape = Shape(layers=8, width=64, heads=4, vocab_size=8000)
    first, last = partition.cheapest(partition.costs(shape, tokens=512, sequence_length=256), 2)
    assert len(first) > len(last)


def test_units_add_up_to_the_model():
    """Operations and weights of all units are those of the whole."""
    assert sum(count.unit_flops_per_token(SHAPE, 128)) == count.flops_per_token(SHAPE, 128)
    assert sum(count.unit_parameters(SHAPE)) == count.parameters(SHAPE)


def test_by_hand():
    """The embedding goes with the first stage, the head with the last, which may have nothing else."""
    assert partition.by_hand([2, 4], layers=6) == [range(3), range(3, 8)]
    assert partition.by_hand([0, 6, 0], layers=6) == [range(1), range(1, 7), range(7, 8)]
    for wrong in ([2, 3], [3, 0, 3]):
        with pytest.raises(UserError, match="--parallel.split " + ",".join(map(str, wrong))):
            partition.by_hand(wrong, layers=6)
