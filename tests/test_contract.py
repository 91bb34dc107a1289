"""Every layout that fits on so many ranks trains the model of one rank: the contract, all options against all others.

    mpirun -np 8 python -m pytest tests/test_contract.py

Replicas, pipelines under any schedule and divided memory: the same bits. Ranks that share sequences or layers: the same
within rounding. What fits is what layout.check lets through. Up to three ranks meet all ways to divide memory in every
layout; four and eight, which have many layouts, every layout under every schedule with one of these ways, in turns.
"""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch

from mpilm import assemble
from mpilm.log import UserError
from mpilm.parallel import layout, schedules
from tests.helpers import everywhere
from tests.training_cases import DIVISIBLE, VOCAB, alone, apart, configuration, divisible, parallel

LAYERS = 6      # and embedding and head: eight stages
LARGEST = 1e-5  # relative difference in float32
MOST_WITH_ALL = 3   # ranks whose layouts meet every way to divide memory
WAYS = {"allreduce": {"kind": "allreduce"}, **{f"level {level}": {"kind": "sharded", "level": level}
                                               for level in (1, 2, 3)}}


def dealt(found, ranks, schedule, way):
    """Of many layouts those that meet this way under this schedule; other numbers of ranks have other pairs."""
    turn = list(WAYS).index(way) + sorted(schedules.MENU).index(schedule) + ranks.bit_length()
    return found[turn % len(WAYS)::len(WAYS)]


def options(ranks, schedule, way):
    """Those of replicas and pipelines; without a pipeline one schedule is like another, and meets all ways."""
    found = list(all_options(ranks, schedule))
    if ranks <= MOST_WITH_ALL:
        return found
    return [one for one in found if one["pp"] == 1] + \
        dealt([one for one in found if one["pp"] > 1], ranks, schedule, way)


def all_options(ranks, schedule):
    """All of them that fit."""
    for pp in range(1, ranks + 1):
        chunks = (LAYERS + 2) // pp if schedule == "interleaved" else 1
        # Of these, tree keeps no memory in common: weights of level 3 must be gathered.
        collective = "tree" if ranks // pp in (1, 2, 4, 8) else "shared"
        found = {"collective": collective, "layers": LAYERS, "pp": pp, "schedule": schedule, "chunks": chunks}
        if (pp > 1 or schedule == "1f1b") and fits(found, ranks):
            yield found


def sharing(ranks, schedule, way):
    """Those in which ranks share sequences or layers, of a model of four stages."""
    found = list(all_sharing(ranks, schedule))
    return found if ranks <= MOST_WITH_ALL else dealt(found, ranks, schedule, way)


def all_sharing(ranks, schedule):
    """All of them."""
    for pp, cp, tp in product((1, 2, 3, 4, 8), repeat=3):
        chunks = 4 // pp if schedule == "interleaved" else 1
        found = {"collective": "shared", "pp": pp, "cp": cp, "tp": tp, "schedule": schedule, "chunks": chunks}
        if cp * tp > 1 and (pp > 1 or schedule == "1f1b") and ranks % prod((pp, cp, tp)) == 0 \
                and fits(found | {"model": DIVISIBLE}, ranks):
            yield found


def fits(found, ranks):
    """Whether the program would take it."""
    config = configuration(**found)
    try:
        layout.check(config, assemble.shape_of(config, VOCAB), ranks)
    except UserError:
        return False
    return True


@pytest.fixture(scope="module")
def expected():
    """Losses, norms and weights of one rank."""
    return alone(configuration(layers=LAYERS), precision="bf16")


@pytest.mark.parametrize(("schedule", "way"), list(product(sorted(schedules.MENU), WAYS)))
def test_every_layout_has_the_bits_of_one_rank(schedule, way, expected, comm, watch):
    """Steps in bf16: losses, gradient norms, and the weights that a rank holds."""
    losses, norms, weights = expected
    layouts = list(options(comm.size, schedule, way))
    if not layouts:
        pytest.skip("other pairs have their turn")
    for found in layouts:
        with watch(120):
            mine = parallel(configuration(**found, **WAYS[way]), precision="bf16")
        same = all(torch.equal(weights[name], value) for name, value in mine[2].items())
        everywhere(comm, mine[:2] == (losses, norms) and same, f"{way}, {found}: {mine[:2]}, not {losses, norms}")


@pytest.mark.ranks(min=3, max=4)
def test_nodes_of_different_size(expected, comm, monkeypatch):
    """All ranks but one on one node; buckets that are smaller than a block for each of them."""
    monkeypatch.setenv("MPILM_RANKS_PER_NODE", str(comm.size - 1))
    for way in ({}, {"kind": "sharded", "level": 1}, {"kind": "sharded", "level": 3}):
        mine = parallel(configuration("shared", bucket_mib=0.05, layers=LAYERS, **way), precision="bf16")
        same = all(torch.equal(expected[2][name], value) for name, value in mine[2].items())
        everywhere(comm, mine[:2] == expected[:2] and same, f"{way}: {mine[:2]}, not {expected[:2]}")


@pytest.fixture(scope="module")
def shared():
    """Losses, norms and weights of one rank, of a model whose layers ranks can share."""
    return alone(divisible())


@pytest.mark.parametrize(("schedule", "way"), list(product(sorted(schedules.MENU), WAYS)))
def test_ranks_that_share_sequences_or_layers_are_near_one_rank(schedule, way, shared, comm, watch):
    """Steps in float32: losses and gradient norms, and so the weights that they were made with."""
    for found in sharing(comm.size, schedule, way):
        with watch(120):
            mine = parallel(divisible(**found, **WAYS[way]))
        difference = apart((*mine[:2], {}), shared)
        everywhere(comm, difference < LARGEST, f"{way}, {found}: {difference}")
