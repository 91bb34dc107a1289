"""Gradients of a rank's slots, summed along the fixed binary tree.

A slot is a micro-batch's place in the global batch. The slots of a rank arrive one after the
other; a binary counter adds each to the others in the order of the tree, whoever computes them:

    slot     0        1          2          3
    do    b0 = g0  b0 += g1   b1 = g2    b1 += g3, b0 += b1        b0 = (g0 + g1) + (g2 + g3)

So log2(num_slots) buffers suffice, and one for a rank of one or two slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Visit:
    """What a slot's gradient does: it is put into buffer `into` (`fresh`) or added to it, then `folds` buffers
    below are folded: into -> into - 1 -> ..."""

    into: int
    fresh: bool
    folds: int


def num_buffers(visits: Sequence[Visit]) -> int:
    """How many they use; of the binary counter the number of bits that the last slot's number has."""
    return 1 + max(visit.into for visit in visits)


def tree_visits(num_slots: int) -> list[Visit]:
    """The binary counter over `num_slots` slots, a power of two; after the last one the sum is in buffer 0."""
    assert num_slots & (num_slots - 1) == 0, f"{num_slots} slots are no power of two"
    return [_visit(slot) for slot in range(num_slots)]


def _visit(slot: int) -> Visit:
    merges = (~slot & (slot + 1)).bit_length() - 1
    waiting = slot.bit_count()
    return Visit(into=waiting - bool(merges), fresh=merges == 0, folds=max(0, merges - 1))


def running_visits(num_slots: int) -> list[Visit]:
    """Every slot added to one buffer as it comes: the fast mode's order, for any number of slots."""
    return [Visit(into=0, fresh=slot == 0, folds=0) for slot in range(num_slots)]
