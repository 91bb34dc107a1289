"""Who owns what and in which order sums are made: arithmetic, checked on every size that matters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.comm import order
from mpilm.log import UserError

sizes = st.integers(1, 17)


@given(st.integers(0, 10 * order.BLOCK), sizes)
def test_segments_cover_everything_once_and_evenly(count: int, size: int) -> None:
    cut = order.segments(count, size)
    assert [part.start for part in cut] == [0, *(part.stop for part in cut[:-1])]
    assert cut[-1].stop == count
    lengths = [part.stop - part.start for part in cut]
    unit = order.BLOCK if count >= size * order.BLOCK else 1
    assert max(lengths) - min(lengths) <= unit
    assert all(part.stop % unit == 0 for part in cut[:-1])


@pytest.mark.parametrize(("count", "size", "lengths"), [
    (0, 3, [0, 0, 0]), (1, 2, [0, 1]), (5, 3, [1, 2, 2]), (2 * order.BLOCK, 2, [order.BLOCK, order.BLOCK]),
    (2 * order.BLOCK + 1, 2, [order.BLOCK, order.BLOCK + 1]), (3 * order.BLOCK, 2, [order.BLOCK, 2 * order.BLOCK]),
])
def test_segments_by_hand(count: int, size: int, lengths: list[int]) -> None:
    assert [part.stop - part.start for part in order.segments(count, size)] == lengths


def test_a_count_beyond_two_to_the_31() -> None:
    cut = order.segments(2**33 + 5, 3)
    assert cut[-1].stop == 2**33 + 5
    assert all(part.start % order.BLOCK == 0 for part in cut)


@given(st.integers(0, 100), sizes)
def test_even_runs_cover_every_slot_once(num_slots: int, size: int) -> None:
    dealt = order.even_runs(num_slots, size)
    assert [slot for run in dealt for slot in run] == list(range(num_slots))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def by_definition(low: int, high: int) -> str:
    """sum(low, high) = sum(low, middle) + sum(middle, high), written out."""
    if high - low == 1:
        return str(low)
    middle = low + (high - low) // 2
    return f"({by_definition(low, middle)}+{by_definition(middle, high)})"


def written(steps: list[tuple[int, int]], values: list[str]) -> str:
    """The sum that `steps` make of `values`, written out."""
    values = list(values)
    for into, other in steps:
        values[into] = f"({values[into]}+{values[other]})"
    return values[0]


@pytest.mark.parametrize("size", range(1, 33))
def test_the_tree_is_the_one_defined(size: int) -> None:
    assert written(order.tree(size), [str(rank) for rank in range(size)]) == by_definition(0, size)


@pytest.mark.parametrize("size", range(1, 17))
@pytest.mark.parametrize("num_slots", [16, 32])
def test_ranks_and_slots_make_one_tree(num_slots: int, size: int) -> None:
    dealt = order.runs(num_slots, size)
    assert [slot for run in dealt for slot in run] == list(range(num_slots))
    sums = [by_definition(run.start, run.stop) for run in dealt]
    assert written(order.tree(size), sums) == by_definition(0, num_slots)


@pytest.mark.parametrize(("num_slots", "size"), [(12, 2), (2, 3), (4, 5), (0, 1), (1, 2)])
def test_slots_that_make_no_tree_are_refused(num_slots: int, size: int) -> None:
    with pytest.raises(UserError, match=rf"(?s)over {size} ranks?.*it is {num_slots}\b.*--run\.reproducible false"):
        order.runs(num_slots, size)


@given(sizes, st.integers(1, 6))
def test_nodes_make_the_same_tree(size: int, ranks_per_node: int) -> None:
    nodes = [range(low, min(low + ranks_per_node, size)) for low in range(0, size, ranks_per_node)]
    leaves = [leaf for node in nodes for leaf in order.partials(size, node.start, node.stop)]
    assert [rank for leaf in leaves for rank in leaf] == list(range(size))
    sums = [by_definition(leaf.start, leaf.stop) for leaf in leaves]
    assert written(order.tree_of(size, leaves), sums) == by_definition(0, size)


def test_turns_of_a_power_of_two_of_ranks_are_subtrees():
    """The k-th slots of all ranks are neighbours, and every slot is dealt once."""
    dealt = order.turns(8, 4)
    assert [list(mine) for mine in dealt] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert order.partials(8, 0, 4) == [range(4)]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 9))
def test_pieces_cover_every_slice_once(lengths, length):
    """In order, and none is longer than asked for."""
    ends = [sum(lengths[:number + 1]) for number in range(len(lengths))]
    cut = [slice(end - count, end) for end, count in zip(ends, lengths, strict=True)]
    found = list(order.pieces(cut, length))
    for place, whole in enumerate(cut):
        elements = [element for piece in found for element in range(piece[place].start, piece[place].stop)]
        assert elements == list(range(whole.start, whole.stop))
        assert all(piece[place].stop - piece[place].start <= length for piece in found)
