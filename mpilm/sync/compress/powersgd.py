"""The strongest few directions of every matrix: PowerSGD (arXiv 1905.13727).

A matrix M [n, m] of gradients, residual included, is told as P Q with P [n, r] and Q [r, m]; r is `--sync.rank`. One
step of power iteration a sum, which goes on where the last one stopped:

    P = M Q^T        summed over ranks, then its columns made orthonormal, on every rank alike
    Q = P^T M        summed over ranks; P Q is what everyone takes for the sum of all M
    residual         M - P (P^T M), of this rank

So r (n + m) values are sent instead of n m, as two sums by the collective itself. Vectors, and matrices that this would
not make smaller, are summed as they are, with the first of the two. Everything is float32. Ranks make P orthonormal
each for itself and one column after the other, not in parts for each thread: the same bits on equal processors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mpilm import bridge
from mpilm.comm.collectives import Collective
from mpilm.comm.devices import Array
from mpilm.sync._layout import Layout, Member
from mpilm.sync.compress._base import Way

SEED = 1905_13727
NOTHING = 1e-5      # of a column: what is left of one that lies in the span of those before it is rounding


class Powersgd(Way):
    """`rank` (n + m) values for a matrix of n x m."""

    OPTIONS: ClassVar[tuple[str, ...]] = ("rank",)

    def __init__(self, *, rank: int) -> None:
        self.rank = rank

    def over(self, collective: Collective, layout: Layout) -> Callable[[Array], None]:
        """As Way."""
        return Factors(collective, layout, rank=self.rank).reduce


class Factors:
    """Sums buffers of one layout. Collective over the collective's communicator, like `reduce`.

    Attributes:
        lost: The residual; zero where values are summed as they are.
    """

    def __init__(self, collective: Collective, layout: Layout, *, rank: int) -> None:
        self.collective, self.rank = collective, rank
        self.matrices = [member for member in layout.members if smaller(member, rank)]
        self.others = [member for member in layout.members if not smaller(member, rank)]
        self.lost = torch.zeros(layout.count, device=collective.device.torch)
        rows, columns = sum(m.rows for m in self.matrices), sum(m.count // m.rows for m in self.matrices)
        self._first = collective.allocate(rank * rows + sum(m.count for m in self.others), np.float32)
        self._second = collective.allocate(rank * columns, np.float32)
        self.left = _rows(self._first, [m.rows for m in self.matrices], rank)
        self.right = _rows(self._second, [m.count // m.rows for m in self.matrices], rank)
        plain = bridge.tensor(self._first[rank * rows:], torch.float32)
        self.plain = plain.split([m.count for m in self.others])
        self.warm = [torch.empty_like(right) for right in self.right]
        self._forget()

    def reduce(self, buffer: Array) -> None:
        """Replace `buffer` by the sum over all ranks, as far as its factors tell it; the same bits on every rank."""
        values = bridge.tensor(buffer, torch.float32)
        for member, left, warm in zip(self.matrices, self.left, self.warm, strict=True):
            matrix = _matrix(self.lost, member).add_(_matrix(values, member))
            torch.mm(warm, matrix.t(), out=left)
        for member, plain in zip(self.others, self.plain, strict=True):
            plain.copy_(_run(values, member))
        self.collective.allreduce(self._first)
        for member, left, right in zip(self.matrices, self.left, self.right, strict=True):
            rows = left.cpu()   # on a host it is `left` itself
            orthonormalize(rows.numpy())
            left.copy_(rows)
            matrix = _matrix(self.lost, member)
            torch.mm(left, matrix, out=right)
            matrix.addmm_(left.t(), right, alpha=-1)
        self.collective.allreduce(self._second)
        self._tell(values)

    def _tell(self, values: Tensor) -> None:
        """Put together what the factors say, and begin with them the next time."""
        for member, plain in zip(self.others, self.plain, strict=True):
            _run(values, member).copy_(plain)
        for member, left, right, warm in zip(self.matrices, self.left, self.right, self.warm, strict=True):
            torch.mm(left.t(), right, out=_matrix(values, member))
            for old, new in zip(warm, right, strict=True):
                if new.any():   # a direction with nothing in it would never have anything again
                    old.copy_(new)
        if not torch.isfinite(values.sum()):
            self._forget()

    def _forget(self) -> None:
        """Begin anew, as must be after gradients that were not finite; all ranks see the same sum and do it together.
        """
        self.lost.zero_()
        random = torch.Generator().manual_seed(SEED)
        for warm in self.warm:
            warm.copy_(torch.empty(warm.shape).normal_(generator=random))


def smaller(member: Member, rank: int) -> bool:
    """Whether its factors have fewer values than the matrix. No vector's do."""
    columns = member.count // member.rows
    return rank * (member.rows + columns) < member.count


def orthonormalize(rows: np.ndarray) -> None:
    """Make the rows of [r, n] orthonormal, in place (Gram-Schmidt, each row twice); zero where one adds nothing.

    By one thread: threads would cut sums where their number says.
    """
    for number, row in enumerate(rows):
        row *= 1 / high if (high := np.abs(row).max()) else 0
        before = np.einsum("i,i->", row, row)
        for earlier in [*rows[:number], *rows[:number]]:
            row -= np.einsum("i,i->", earlier, row) * earlier
        after = np.einsum("i,i->", row, row)
        row *= 0 if after <= NOTHING**2 * before else 1 / np.sqrt(after)


def _rows(buffer: Array, lengths: list[int], rank: int) -> list[Tensor]:
    """[rank, length] for every length, one after the other."""
    whole = bridge.tensor(buffer[:rank * sum(lengths)], torch.float32)
    parts = whole.split([rank * length for length in lengths])
    return [part.view(rank, -1) for part in parts]


def _run(flat: Tensor, member: Member) -> Tensor:
    return flat[member.start:member.start + member.count]


def _matrix(flat: Tensor, member: Member) -> Tensor:
    return _run(flat, member).view(member.rows, -1)
