"""Every way to send fewer bytes, for every kind of synchronization that takes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpilm.comm.order import BLOCK
from mpilm.comm.p2p import Traffic
from mpilm.launch import session
from mpilm.sync import compress
from mpilm.sync.compress import Codec
from tests import server_cases
from tests.helpers import everywhere, same_everywhere
from tests.server_cases import play, with_servers
from tests.sync.test_resharding import step
from tests.training_cases import alone, build, configuration, windows

WAYS = [name for name in compress.names() if name != "none"]
CODECS = [name for name in WAYS if issubclass(compress.get(name), Codec)]
STEPS = 6
COUNT = 4 * BLOCK + 7     # values of `server_cases.play`'s parameters


def compressed(config, way, warmup=0):
    """The same, sending less."""
    config.sync.compress, config.sync.compress_warmup = way, warmup
    return config


def course(config, world):
    """Losses, norms and what was sent, of a few steps; then the weights."""
    core, before = build(config, world), Traffic.sent
    seen = [step(core, number % 2) for number in range(STEPS)]
    weights = torch.cat([p.detach().flatten() for p in core.parameters().values()])
    return seen, Traffic.sent - before, weights.numpy()


@pytest.mark.turns(at=(3, 4))
@pytest.mark.parametrize("way", WAYS)
def test_sharded_learns_what_allreduce_learns(way, comm):
    """The same codes of the same gradients, whoever updates what; a small bucket may be cut elsewhere."""
    with session() as world:
        expected = course(compressed(configuration("ring", reproducible=False), way, warmup=2), world)
        found = course(compressed(configuration("ring", reproducible=False, kind="sharded"), way, warmup=2), world)
        np.testing.assert_allclose([loss for loss, _ in found[0]], [loss for loss, _ in expected[0]], rtol=0.03)
        same_everywhere(comm, found[2])
        world.comm.Barrier()


@pytest.mark.turns(at=(3, 4))
@pytest.mark.parametrize("way", WAYS)
def test_local_sgd_sends_differences_so(way, comm):
    """Few bytes at the end of a round, none within; all ranks have the same bits after it, and nothing is lost: with
    SGD's plain average, what came of two rounds and what residuals hold is what came uncompressed."""
    def config(way):
        made = compressed(configuration("ring", reproducible=False, kind="local_sgd"), way)
        made.sync.every = 3
        return made

    with session() as world:
        _, whole, exact = course(config("none"), world)
        losses, sent, weights = course(config(way), world)
        same_everywhere(comm, weights)
        everywhere(comm, bool(np.isfinite(losses).all()))
        everywhere(comm, comm.size == 1 or sent < 0.6 * whole, f"{sent} of {whole} bytes")
        distance = np.abs(weights - exact).max() / np.abs(exact).max()
        everywhere(comm, distance < (0.01 if way in ("bf16", "int8") else 1.0), f"{distance}")
        world.comm.Barrier()


@pytest.mark.ranks(min=2, max=3)
@pytest.mark.parametrize("way", CODECS)
@pytest.mark.parametrize("staleness", [0, float("inf")])
def test_servers_get_everything_but_what_residuals_hold(way, staleness, comm):
    """Gradients of ones: weights are the sum of what has come. Uncompressed at first."""
    for servers in range(1, comm.size):
        workers = comm.size - servers
        saw = play(comm, servers=servers, staleness=staleness, way=compress.get(way)(), warmup=2,
                   delays=[[0.0] * STEPS] * workers)
        lost = sum(one.lost for one in saw)
        given = STEPS * workers * COUNT
        assert {one.weights[-1] for one in saw} == {lost - given}, f"{servers} servers"
        assert (lost == 0) is (way != "topk"), "ones are exact in all other codes"


@pytest.mark.ranks(min=2, max=3)
def test_servers_get_gradients_as_they_are_in_the_warm_up(comm):
    """By messages, though they share memory: the bits of allreduce."""
    config = compressed(with_servers(1), "int8", warmup=99)
    expected, mine = alone(configuration()), server_cases.train(config)
    everywhere(comm, mine is None or mine[:2] == expected[:2])


@pytest.mark.slow
@pytest.mark.ranks(min=2, max=3)
@pytest.mark.parametrize("way", CODECS)
@pytest.mark.parametrize("staleness", [0, "inf"])
def test_servers_that_get_codes_learn(way, staleness, comm):
    """A small batch by heart."""
    config = compressed(with_servers(1, staleness=staleness, sequences=4), way, warmup=5)
    config.run.steps = 30
    mine = server_cases.train(config, draw=lambda step: windows(0))
    everywhere(comm, mine is None or mine[0][-1] < mine[0][0] / 2, str(mine and mine[0]))
