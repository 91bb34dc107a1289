"""Zig-zag order: every rank has as much to do in every round, and every pair of tokens is seen once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.parallel import zigzag

pytestmark = pytest.mark.serial
sizes = st.integers(1, 9)


def work(rank, owner, count):
    """Tiles of scores that `rank` computes on the keys of `owner`, each of which has `count` tiles a chunk."""
    return [tile for pair in zigzag.pairs(rank, owner) for tile in zigzag.tiles(pair, count)]


@given(sizes, st.integers(1, 5))
def test_every_rank_computes_as_many_tiles_in_every_round(size, count):
    """In round `turn` rank r has the keys of rank r - turn. Round 0 is half a triangle more or less."""
    for turn in range(size):
        loads = {len(work(rank, (rank - turn) % size, count)) for rank in range(size)}
        diagonals = {sum(tile.diagonal for tile in work(rank, (rank - turn) % size, count)) for rank in range(size)}
        assert loads == {2 * count ** 2 if turn else count ** 2 + count * (count + 1)}
        assert diagonals == {0 if turn else 2 * count}


@given(sizes, st.integers(1, 4))
def test_every_visible_tile_is_computed_once(size, count):
    """By the rank that has its queries: all below the diagonal, and half of what lies on it."""
    seen = Counter()
    for rank in range(size):
        for owner in range(size):
            for pair in zigzag.pairs(rank, owner):
                row, column = zigzag.chunks(rank, size)[pair.queries], zigzag.chunks(owner, size)[pair.keys]
                for tile in zigzag.tiles(pair, count):
                    place = row * count + tile.queries, column * count + tile.keys
                    seen[place] += 1
                    assert tile.diagonal == (place[0] == place[1])
    total = 2 * size * count
    assert seen == {(row, column): 1 for row in range(total) for column in range(row + 1)}


@given(sizes, st.integers(1, 4))
def test_a_row_begins_with_itself(size, count):
    """A query sees itself whatever the documents, so no row of the first tile it meets is hidden altogether."""
    for rank in range(size):
        met = set()
        for pair in zigzag.pairs(rank, rank):
            for tile in zigzag.tiles(pair, count):
                row = pair.queries, tile.queries
                assert row in met or tile.diagonal
                met.add(row)


@given(st.integers(1, 50), st.integers(1, 12))
def test_tiles_of_a_chunk_are_even_and_cover_it(length, most):
    """One after the other, none empty, none too large."""
    cuts = zigzag.cuts(length, most)
    tokens = [token for cut in cuts for token in range(cut.start, cut.stop)]
    assert tokens == list(range(length))
    sizes = {cut.stop - cut.start for cut in cuts}
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1
