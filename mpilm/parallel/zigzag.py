"""Who has which part of a sequence, and who attends to whom: arithmetic on chunks.

A causal sequence is no even work: late tokens look at many, early ones at few. So it is cut into 2 x size chunks, and
rank r has chunk r and chunk 2 x size - 1 - r, one early and one late:

    size 3     chunk   0  1  2  3  4  5
               rank    0  1  2  2  1  0

In every round of the ring a rank meets the keys of one rank, and half of the four pairs of chunks are visible, whoever
it is; so all ranks compute equally much in every round. (That contiguous pieces are uneven, and an interleaved order is
not: arXiv 2311.09431, which deals single tokens; two chunks a rank: arXiv 2407.21783, section 3.3.2.)

    of an earlier rank    both my chunks look at its early chunk
    of a later rank       my late chunk looks at both its chunks
    my own                my late chunk looks at my early one, and each at itself as far as the diagonal
"""

from __future__ import annotations

from typing import NamedTuple

EARLY, LATE = 0, 1


class Pair(NamedTuple):
    """One of my chunks looks at one of theirs; `diagonal`: they are the same chunk."""

    queries: int
    keys: int
    diagonal: bool = False


def chunks(rank: int, size: int) -> tuple[int, int]:
    """The numbers of a rank's early and late chunk, of 2 x size."""
    return rank, 2 * size - 1 - rank


def pairs(rank: int, owner: int) -> list[Pair]:
    """What `rank` sees of the chunks of `owner`; a chunk's own diagonal comes first."""
    if owner < rank:
        return [Pair(EARLY, EARLY), Pair(LATE, EARLY)]
    if owner > rank:
        return [Pair(LATE, EARLY), Pair(LATE, LATE)]
    return [Pair(EARLY, EARLY, diagonal=True), Pair(LATE, LATE, diagonal=True), Pair(LATE, EARLY)]


def cuts(length: int, most: int) -> list[slice]:
    """A chunk of `length` tokens in tiles of at most `most`, as even as possible."""
    tiles = -(-length // most)
    return [slice(length * tile // tiles, length * (tile + 1) // tiles) for tile in range(tiles)]


def tiles(pair: Pair, count: int) -> list[Pair]:
    """The visible tiles of a pair of chunks that are cut into `count` tiles each; a tile's own diagonal comes first."""
    if pair.diagonal:
        return [Pair(row, column, diagonal=row == column) for row in range(count) for column in range(row, -1, -1)]
    return [Pair(row, column) for row in range(count) for column in range(count)]
