"""Inputs and expectations that the tests of the collectives share."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from mpi4py import MPI

from mpilm.comm import collectives, order
from mpilm.comm.collectives import Collective
from mpilm.comm.node import Node
from mpilm.comm.transport import ON_HOST, Transport
from mpilm.log import UserError

DTYPES = ("float32", "float64", "int64")
DRAWN = 250_007     # values that differ; a longer buffer has them again and again


def build(name: str, comm: MPI.Comm, node: Node, *, reproducible: bool = False,
          transport: Transport = ON_HOST) -> Collective | None:
    """The collective, or None where it says that it cannot work on so many ranks, or by this transport."""
    try:
        return collectives.get(name)(comm, node, reproducible=reproducible, transport=transport)
    except UserError:
        return None


@lru_cache(64)
def values(rank: int, count: int, dtype: str, seed: int = 0) -> np.ndarray:
    """What `rank` contributes: random, of very different sizes, so that the order of a sum shows in its last bits.
    Read-only."""
    random, number = np.random.default_rng([rank, count, seed]), min(count, DRAWN)
    drawn = random.integers(-(2**40), 2**40, number)
    if dtype != "int64":
        drawn = (random.normal(size=number) * 10.0 ** (drawn % 7 - 3)).astype(dtype)
    drawn = np.resize(drawn, count)
    drawn.setflags(write=False)
    return drawn


def expected(size: int, count: int, dtype: str, seed: int = 0, *, part: slice = slice(None)) -> np.ndarray:
    """`part` of the sum over ranks, in float64 (integers exactly)."""
    wide = np.int64 if dtype == "int64" else np.float64
    total = np.zeros(count, wide)[part]
    for rank in range(size):
        total += values(rank, count, dtype, seed)[part]
    return total


def in_tree_order(size: int, count: int, dtype: str, seed: int = 0) -> np.ndarray:
    """The sum over ranks in its own precision, in the order of order.tree."""
    held = [values(rank, count, dtype, seed) for rank in range(size)]
    for into, other in order.tree(size):
        held[into] = held[into] + held[other]
    return held[0]


def close(got: np.ndarray, wanted: np.ndarray, size: int) -> bool:
    """Within the rounding of `size` additions of numbers up to 1e4."""
    if got.dtype == np.int64:
        return bool((got == wanted).all())
    return bool(np.allclose(got, wanted, rtol=0, atol=size * 4e4 * np.finfo(got.dtype).eps))
