"""Every layout that fits on so many ranks trains the model of one rank: the contract, all options against all others.

    mpirun -np 8 python -m pytest tests/test_contract.py

Replicas, pipelines under any schedule and divided memory: the same bits. What fits is what layout.check lets through.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from mpilm import assemble
from mpilm.log import UserError
from mpilm.parallel import layout, schedules
from tests.helpers import everywhere
from tests.training_cases import VOCAB, alone, configuration, parallel

LAYERS = 6      # and embedding and head: eight stages
WAYS = {"allreduce": {"kind": "allreduce"}, **{f"level {level}": {"kind": "sharded", "level": level}
                                               for level in (1, 2, 3)}}


def options(ranks, schedule):
    """Those of all layouts that fit; without a pipeline one schedule is like another."""
    for pp in range(1, ranks + 1):
        chunks = (LAYERS + 2) // pp if schedule == "interleaved" else 1
        # Of these, tree keeps no memory in common: weights of level 3 must be gathered.
        collective = "tree" if ranks // pp in (1, 2, 4, 8) else "shared"
        found = {"collective": collective, "layers": LAYERS, "pp": pp, "schedule": schedule, "chunks": chunks}
        if (pp > 1 or schedule == "1f1b") and fits(found, ranks):
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
    """Three steps in bf16: losses, gradient norms, and the weights that a rank holds."""
    losses, norms, weights = expected
    for found in options(comm.size, schedule):
        with watch(120):
            mine = parallel(configuration(**found, **WAYS[way]), precision="bf16")
        same = all(torch.equal(weights[name], value) for name, value in mine[2].items())
        everywhere(comm, mine[:2] == (losses, norms) and same, f"{way}, {found}: {mine[:2]}, not {losses, norms}")
