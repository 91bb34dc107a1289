"""The binary counter sums slots along the tree that ranks continue."""

import pytest

from mpilm.comm import order
from mpilm.sync._slots import num_buffers, running_visits, tree_visits


def play(visits, buffers):
    """Carry the visits out on strings, which show in which order they were added."""
    sums = [""] * buffers
    for slot, visit in enumerate(visits):
        sums[visit.into] = str(slot) if visit.fresh else f"({sums[visit.into]}+{slot})"
        for lower in range(visit.into - 1, visit.into - 1 - visit.folds, -1):
            sums[lower] = f"({sums[lower]}+{sums[lower + 1]})"
    return sums[0]


def by_tree(num_slots):
    """The sum over `order.tree`, which is what ranks do when every slot has a rank of its own."""
    sums = [str(slot) for slot in range(num_slots)]
    for into, other in order.tree(num_slots):
        sums[into] = f"({sums[into]}+{sums[other]})"
    return sums[0]


@pytest.mark.parametrize("num_slots", [1, 2, 4, 8, 16, 32])
def test_slots_of_one_rank_are_summed_as_slots_of_many(num_slots):
    """One rank with all slots and one rank a slot give the same expression."""
    assert play(tree_visits(num_slots), num_buffers(tree_visits(num_slots))) == by_tree(num_slots)


def test_fast_mode_adds_as_slots_come():
    """Any number of slots, one buffer."""
    assert play(running_visits(3), 1) == "((0+1)+2)"


def test_few_buffers_are_enough():
    """The binary counter needs the logarithm."""
    assert [num_buffers(tree_visits(n)) for n in (1, 2, 4, 8, 64)] == [1, 1, 2, 3, 6]
