"""Ring and tree as schedules, played by one process for 1 to 8 ranks: nothing is lost, nothing doubled, no deadlock."""

from __future__ import annotations

import numpy as np
import pytest

from mpilm.comm import order
from mpilm.comm.collectives import ring, tree
from mpilm.comm.collectives._pipeline import Stage


def play(schedules: list[list[Stage]], values: list[np.ndarray]) -> list[np.ndarray]:
    """Run all ranks' stages in lockstep on copies of `values`; every message must be expected where it goes."""
    held = [value.copy() for value in values]
    for stages in zip(*schedules, strict=True):
        sent = {(rank, stage.dest): held[rank][stage.send].copy() for rank, stage in enumerate(stages)}
        for rank, stage in enumerate(stages):
            message = sent.pop((stage.source, rank))
            held[rank][stage.receive] = message + held[rank][stage.receive] if stage.add else message
        assert not sent
    return held


@pytest.mark.parametrize("length", [0, 1, 3, 8, 100, 3 * order.BLOCK + 1])
@pytest.mark.parametrize("size", range(1, 9))
def test_ring(size: int, length: int) -> None:
    values = [np.arange(length) * 10**rank for rank in range(size)]
    for held in play([ring.stages(length, rank, size) for rank in range(size)], values):
        np.testing.assert_array_equal(held, sum(values))


@pytest.mark.parametrize("length", [0, 1, 3, 8, 100, 3 * order.BLOCK + 1])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_tree_sums_in_tree_order(size: int, length: int) -> None:
    values = [np.random.default_rng(rank).normal(size=length).astype(np.float32) for rank in range(size)]
    expected = [value.copy() for value in values]
    for into, other in order.tree(size):
        expected[into] += expected[other]
    for held in play([tree.stages(length, rank, size) for rank in range(size)], values):
        np.testing.assert_array_equal(held, expected[0])


@pytest.mark.parametrize("length", [0, 1, 3, 8, 100, 3 * order.BLOCK + 1])
@pytest.mark.parametrize("size", range(1, 9))
def test_the_phases_of_a_ring(size: int, length: int) -> None:
    values = [np.arange(length) * 10**rank for rank in range(size)]
    cut = order.segments(length, size)
    scattered = play([ring.scatter_stages(cut, rank) for rank in range(size)], values)
    for held, own in zip(scattered, cut, strict=True):
        np.testing.assert_array_equal(held[own], sum(values)[own])
    for held in play([ring.gather_stages(cut, rank) for rank in range(size)], scattered):
        np.testing.assert_array_equal(held, sum(values))


@pytest.mark.parametrize("size", range(2, 9))
def test_a_ring_sends_the_least_there_is(size: int) -> None:
    length = size * order.BLOCK
    sent = sum(stage.send.stop - stage.send.start for stage in ring.stages(length, 0, size))
    assert sent == 2 * (size - 1) * length // size
