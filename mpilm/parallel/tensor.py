"""Tensor parallelism: the ranks of a team share every layer; each has a size-th of its matrices and of the tokens.

    team = Team(exchange.build("auto", mesh.tp, rows=batch * tokens, width=width, dtype=torch.bfloat16))
    part = GPT(shape, units, context, team)

A block is two pairs of matrices. The first of a pair is held by outputs (columns of x W^T: heads, hidden elements), the
second by inputs, so nothing is exchanged between them; what the second one makes is a part of a sum over the team. The
table and the head are held by rows of the vocabulary. (Megatron-LM, arXiv 1909.08053.)

    my tokens      norm, residual                           [B, T / size, C]
      gather                                                everyone's tokens
    all tokens     by outputs, attention or SwiGLU, by inputs
      scatter                                               the sum over the team, of my tokens
    my tokens      residual, norm

So what lies between the pairs is not computed, and kept, by everyone (sequence parallelism, arXiv 2205.05198, section
4.2). In the backward pass a gathering is a scattering and the other way round. A norm sees a rank's own tokens: the
gradient of its weight is summed over the team, in float32, so that all have the same bits of what all hold.

Exchanges are operators that a compiler takes as they are: compiled code goes on through them.
"""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from mpilm.model.softmax import Softmax
from mpilm.model.split import Alone
from mpilm.parallel import vocabulary
from mpilm.parallel.exchange import Exchange, total

TOKENS = 1      # the dimension of [B, T, C]

_numbers = count()
_teams: WeakValueDictionary[int, Team] = WeakValueDictionary()      # an operator takes numbers and tensors only


class Team(Alone):
    """The ranks of `exchange`, which share every layer. Its methods are collective over them, and so are the backward
    passes through what they return. Heads, hidden elements, vocabulary and tokens must be multiples of `size`.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange, self.rank, self.size = exchange, exchange.rank, exchange.size
        _define_operators()
        self.number = next(_numbers)
        _teams[self.number] = self

    def gather(self, x: Tensor) -> Tensor:
        """As Alone."""
        y: Tensor = _Gather.apply(x, self.number)
        return y

    def scatter(self, x: Tensor) -> Tensor:
        """As Alone."""
        y: Tensor = _Scatter.apply(x, self.number)
        return y

    def common(self, weight: Tensor) -> Tensor:
        """As Alone."""
        y: Tensor = _Common.apply(weight, self.number)
        return y

    def embed(self, tokens: Tensor, table: Tensor, *, sparse: bool) -> Tensor:
        """As Alone."""
        at = tokens - self.rank * len(table)
        elsewhere = (at < 0) | (at >= len(table))
        rows = F.embedding(at.masked_fill(elsewhere, 0), table, sparse=sparse)
        return self.scatter(rows.masked_fill(elsewhere[..., None], 0))

    def softmax(self, vocab_size: int) -> Softmax:
        """As Alone."""
        return vocabulary.Softmax(self.exchange, self.of(vocab_size))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: int) -> Tensor:
        ctx.team = team
        y: Tensor = torch.ops.mpilm.gather(x, team, TOKENS)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.mpilm.scatter(gradients[0], ctx.team, TOKENS), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: int) -> Tensor:
        ctx.team = team
        y: Tensor = torch.ops.mpilm.scatter(x, team, TOKENS)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.mpilm.gather(gradients[0], ctx.team, TOKENS), None


class _Common(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, team: int) -> Tensor:
        ctx.team = team
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return total(torch.ops.mpilm.gather(gradients[0][None], ctx.team, 0).unbind()), None


def _gather(x: Tensor, team: int, dim: int) -> Tensor:
    return _teams[team].exchange.gather(x, dim)


def _scatter(x: Tensor, team: int, dim: int) -> Tensor:
    return _teams[team].exchange.scatter(x, dim)


def _gathered(x: Tensor, team: int, dim: int) -> Tensor:
    """What `_gather` makes, without its values: for the compiler."""
    return x.new_empty([size * _teams[team].size if number == dim else size for number, size in enumerate(x.shape)])


def _scattered(x: Tensor, team: int, dim: int) -> Tensor:
    return x.new_empty([size // _teams[team].size if number == dim else size for number, size in enumerate(x.shape)])


@cache
def _define_operators() -> torch.library.Library:
    library = torch.library.Library("mpilm", "DEF")
    for name, run, shape in (("gather", _gather, _gathered), ("scatter", _scatter, _scattered)):
        library.define(f"{name}(Tensor x, int team, int dim) -> Tensor")
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mpilm::{name}", shape, lib=library)
    return library
