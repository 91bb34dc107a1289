"""Sampler: (seed, step) -> the ids of the sequences of that step. A pure function of integers.

The order of an epoch is a pseudo-random permutation that is computed, not stored: a Feistel network permutes
0 ... 2^b - 1, the smallest such range that holds all sequences, and is applied again to whatever lands outside
("cycle walking"; under two rounds on average). Any position costs the same, so any step resumes at once, and a
trillion sequences need no list.

                 left  right
                   |     |
                   |<- F(right, key of seed, epoch, round)      XOR; halves swap; eight rounds
                   |     |

Invariants: every sequence once per epoch; the number of ranks never enters. A step may hold the end of one epoch and
the beginning of the next. `Spread` is the order for validation.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np

ROUNDS = 8


class Order(Protocol):
    """What the loader asks: the ids of the sequences of a step, [sequences of a step] int64."""

    def ids(self, step: int) -> np.ndarray: ...


class Sampler:
    """A new pseudo-random order of all sequences in every epoch."""

    def __init__(self, num_sequences: int, *, global_batch_size: int, seed: int) -> None:
        if num_sequences < 1 or global_batch_size < 1:
            raise ValueError(f"num_sequences {num_sequences} and global_batch_size {global_batch_size} must be >= 1")
        self.num_sequences = num_sequences
        self.global_batch_size = global_batch_size
        digest = hashlib.blake2b(str(int(seed)).encode(), digest_size=8).digest()
        self._seed = np.uint64(int.from_bytes(digest, "little"))
        bits = max(6, (num_sequences - 1).bit_length())  # fewer bits mix badly
        self._widths = (bits - bits // 2, bits // 2)

    def ids(self, step: int) -> np.ndarray:
        """Sequence ids of a step: [global_batch_size] int64. Step s takes the positions s*G ... s*G + G - 1."""
        first = step * self.global_batch_size
        epoch, offset = divmod(first, self.num_sequences)
        position = np.arange(offset, offset + self.global_batch_size, dtype=np.int64)
        epochs = (position // self.num_sequences + epoch).astype(np.uint64)
        return self._permute((position % self.num_sequences).astype(np.uint64), epochs).astype(np.int64)

    def _permute(self, values: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        keys = _mix(epochs ^ self._seed)
        values = self._feistel(values, keys)
        while (outside := np.flatnonzero(values >= self.num_sequences)).size:
            values[outside] = self._feistel(values[outside], keys[outside])
        return values

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Permute [0, 2^bits). Of unequal halves (odd bits) the widths swap with the halves."""
        wide, narrow = (np.uint64(width) for width in self._widths)
        left, right = values >> narrow, values & _ones(narrow)
        for number in range(ROUNDS):
            mixed = _mix(right ^ (keys + np.uint64((number * 0x9E3779B97F4A7C15) % 2**64)))
            left, right = right, left ^ (mixed & _ones(wide))
            wide, narrow = narrow, wide
        return left << narrow | right


def _ones(width: np.uint64) -> np.uint64:
    return np.uint64((1 << int(width)) - 1)


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64 (the finalizer of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Spread:
    """The order for validation: always the same `count` sequences, evenly spaced over the split.

    Args:
        num_sequences: Of the split.
        count: Sequences taken of them.
        mine: Which of those taken are wanted; None: all.
        a_step: How many of them make a step, the last of which may have fewer; 0: every step is all of them.
    """

    def __init__(self, num_sequences: int, *, count: int, mine: range | None = None, a_step: int = 0) -> None:
        self.num_sequences, self.count = num_sequences, count
        self.mine = range(count) if mine is None else mine
        self.a_step = a_step

    def ids(self, step: int) -> np.ndarray:
        """Sequence ids of a step: [a_step] int64, or fewer."""
        wanted = self.mine[step * self.a_step:(step + 1) * self.a_step] if self.a_step else self.mine
        return np.arange(wanted.start, wanted.stop, dtype=np.int64) * self.num_sequences // self.count
