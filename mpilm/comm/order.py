"""Who owns what, and in which order sums are made: pure arithmetic, no MPI.

Two decisions carry the promise of the same bits on any layout.

Slots: the micro-batches of a step are slots 0 .. S-1, S a power of two in reproducible mode. A rank owns a contiguous
run of them, found by halving slots and ranks together, so what a rank sums is a whole subtree of the one binary tree
over slots:

    slots        0 1 2 3 | 4 5 | 6 7          8 slots, 3 ranks: runs(8, 3) == [0..3], [4..5], [6..7]
    rank              0      1     2
    sum          r0 + (r1 + r2)               tree(3) == [(1, 2), (0, 1)]

Ranks then combine in `tree(size)`, the upper part of the same tree. Ranks never enter the arithmetic.

Elements: a reduced buffer is cut into one `segments` slice a rank, at multiples of BLOCK, so that whoever sums over
fixed blocks of BLOCK elements (the gradient norm) never meets half a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from mpilm.log import UserError, counted

BLOCK = 16384  # elements; what is summed over elements is summed over blocks of this many


def segments(count: int, size: int) -> list[slice]:
    """Cut range(count) into `size` consecutive slices, as even as possible.

    Cuts are multiples of BLOCK if there is a block for everyone, else single elements; with fewer elements than
    ranks some slices are empty.

    >>> segments(5, 3)
    [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)]
    """
    unit = BLOCK if count >= size * BLOCK else 1
    units = -(-count // unit)
    cuts = [min(count, units * rank // size * unit) for rank in range(size + 1)]
    return [slice(low, high) for low, high in pairwise(cuts)]


def pieces(cut: Sequence[slice], length: int) -> Iterator[list[slice]]:
    """The first `length` elements of every slice, then the next of every slice, and so on; short ones end early.

    >>> list(pieces([slice(0, 3), slice(3, 5)], 2))
    [[slice(0, 2, None), slice(3, 5, None)], [slice(2, 3, None), slice(5, 5, None)]]
    """
    for start in range(0, max(piece.stop - piece.start for piece in cut), length):
        yield [slice(min(piece.start + start, piece.stop), min(piece.start + start + length, piece.stop))
               for piece in cut]


def even_runs(num_slots: int, size: int) -> list[range]:
    """The contiguous run of slots of each rank, as even as possible, for any number of slots: fast mode's."""
    cuts = [num_slots * rank // size for rank in range(size + 1)]
    return [range(low, high) for low, high in pairwise(cuts)]


def runs(num_slots: int, size: int) -> list[range]:
    """The contiguous run of slots of each rank, every one a whole subtree of the tree over slots: reproducible mode's.

    Raises:
        UserError: `num_slots` is not a power of two, or too small to give every rank a subtree of its own.
    """
    least = 1 << (size - 1).bit_length()
    if num_slots < 1 or num_slots & (num_slots - 1) or num_slots < least:
        raise UserError(
            "Reproducible mode sums the micro-batches of a step (--data.global_batch_size / --data.micro_batch_size) "
            f"along a binary tree: over {counted(size, 'rank')} their number must be a power of two, {least} or more, "
            f"and it is {num_slots}. Choose such batch sizes, or type --run.reproducible false."
        )
    return _halve(0, num_slots, size)


def turns(num_slots: int, size: int) -> list[range]:
    """Slots dealt to ranks in turns: rank r has r, r + size, ... The k-th slots of all ranks are neighbours.

    For a power of two of ranks they are a whole subtree of the tree over slots, so ranks can be summed before slots.

    Raises:
        UserError: As `runs`.
    """
    runs(num_slots, size)
    return [range(rank, num_slots, size) for rank in range(size)]


def _halve(low: int, high: int, ranks: int) -> list[range]:
    if ranks == 1:
        return [range(low, high)]
    middle = low + (high - low) // 2
    return _halve(low, middle, ranks // 2) + _halve(middle, high, ranks - ranks // 2)


def tree(size: int) -> list[tuple[int, int]]:
    """The order in which `size` values are summed: for (into, other): value[into] += value[other]; the sum is value[0].

    sum(low, high) = sum(low, middle) + sum(middle, high), middle = low + (high - low) // 2, depth first.

    >>> tree(4)
    [(0, 1), (2, 3), (0, 2)]
    """
    return subtree(0, size)


def subtree(low: int, high: int) -> list[tuple[int, int]]:
    """The part of `tree` that sums values low .. high-1 into value[low]."""
    if high - low <= 1:
        return []
    middle = low + (high - low) // 2
    return [*subtree(low, middle), *subtree(middle, high), (low, middle)]


def partials(size: int, low: int, high: int) -> list[range]:
    """The largest subtrees of tree(size) that lie within low .. high-1, in order.

    They are what a node that holds these ranks can sum by itself without leaving the order.

    >>> partials(3, 0, 2)
    [range(0, 1), range(1, 2)]
    """
    return _partials(0, size, low, high)


def _partials(start: int, stop: int, low: int, high: int) -> list[range]:
    if stop <= low or high <= start:
        return []
    if low <= start and stop <= high:
        return [range(start, stop)]
    middle = start + (stop - start) // 2
    return _partials(start, middle, low, high) + _partials(middle, stop, low, high)


def tree_of(size: int, leaves: list[range]) -> list[tuple[int, int]]:
    """What is left of tree(size) once every one of `leaves`, subtrees that together cover it, is summed.

    Values are numbered by leaf: for (into, other): value[into] += value[other].
    """
    number = {leaf.start: index for index, leaf in enumerate(leaves)}
    inside = {step for leaf in leaves for step in subtree(leaf.start, leaf.stop)}
    return [(number[into], number[other]) for into, other in tree(size) if (into, other) not in inside]
