"""Servers and workers: with staleness 0 the bits of allreduce, otherwise never more apart than allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm import assemble, connect
from mpilm.comm import arrays
from mpilm.comm.order import BLOCK
from mpilm.comm.worker import Inline
from mpilm.log import UserError
from mpilm.optim import Sgd
from tests import server_cases
from tests.helpers import everywhere
from tests.server_cases import everyone, play, serve, with_servers
from tests.training_cases import STEPS, alone, batch_of, configuration, windows

pytestmark = pytest.mark.ranks(min=2, max=3)
RULES = ("none", "scale", "compensate")


def same(expected, mine):
    """A worker's losses, norms and weights, to the bit; a server has none."""
    return mine is None or (mine[:2] == expected[:2] and
                            all(torch.equal(mine[2][name], value) for name, value in expected[2].items()))


@pytest.mark.turns(at=(3, 4))
@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_staleness_0_has_the_bits_of_allreduce(rule, precision, comm, monkeypatch):
    """For every number of servers; buckets of any size; one worker and several."""
    if rule == "sgd":
        monkeypatch.setattr(assemble, "Update", Sgd)
    expected = alone(configuration(), precision=precision)
    for servers in range(1, comm.size):
        for bucket_mib in (0.05, 64.0):
            mine = server_cases.train(with_servers(servers, bucket_mib=bucket_mib), precision=precision)
            everywhere(comm, same(expected, mine), f"{servers} servers, buckets of {bucket_mib} MiB")


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("without", [{"MPILM_RANKS_PER_NODE": "1"}, {"MPILM_RANKS_PER_NODE": "2"},
                                     {"MPILM_SHARED_MEMORY": "/dev/null/nowhere"}], ids=str)
def test_over_several_nodes(without, comm, monkeypatch):
    """Emulated ones: gradients are sent, or lie where a server sees them, or both."""
    for name, value in without.items():
        monkeypatch.setenv(name, value)
    expected = alone(configuration(), precision="bf16")
    for servers in range(1, comm.size):
        mine = server_cases.train(with_servers(servers), precision="bf16")
        everywhere(comm, same(expected, mine), f"{servers} servers")


def test_long_gradients_are_sent_in_pieces(comm, monkeypatch):
    """No message is longer than MPI counts; parameters come back in pieces as well."""
    monkeypatch.setenv("MPILM_RANKS_PER_NODE", "1")
    monkeypatch.setattr(arrays, "MESSAGE_BYTES", 10_000)
    everywhere(comm, same(alone(configuration()), server_cases.train(with_servers(1))))


def test_without_a_second_thread_the_bits_are_the_same(comm, monkeypatch):
    """Gradients are pushed after the backward pass then."""
    monkeypatch.setattr(connect, "worker", lambda *_: Inline())
    everywhere(comm, same(alone(configuration()), server_cases.train(with_servers(1))))


def test_the_fast_mode_is_near(comm):
    """Any number of micro-batches for any number of workers."""
    config = with_servers(1, sequences=7)
    config.run.reproducible = False
    expected, mine = alone(configuration(reproducible=False, sequences=7)), server_cases.train(config)
    if mine is not None:
        np.testing.assert_allclose(mine[0], expected[0], rtol=1e-5)


def test_a_bad_gradient_of_one_worker_skips_the_step_of_all(comm):
    """Nothing changes anywhere, and the next step is made with the weights of before."""
    unharmed = alone(configuration())[1][0]
    with everyone(with_servers(1)) as (server, update, core):
        if core is None:
            serve(server, update)
            counts = update.applied, update.skipped
        else:
            norms = _poisoned_steps(comm, core)
            assert np.isnan(norms[0]) and norms[1] == unharmed
            counts = core.update.applied, core.update.skipped
    everywhere(comm, counts == (STEPS - 1, 1), str(counts))


def _poisoned_steps(comm, core):
    norm = core.parts[-1].norm.weight
    poison = norm.register_hook(lambda g: g * np.nan) if comm.rank == comm.size - 1 else None
    norms = []
    for step in range(STEPS):
        core.pipeline.run(batch_of(core))
        core.update.begin(step)
        core.sync.step(core.update)
        norms.append(core.sync.grad_norm)
        if poison:
            poison.remove()
    return norms


def test_servers_share_by_bytes_and_workers_hold_no_state(comm):
    """Of every bucket as many blocks as the others, one more or less; a tensor may lie on several."""
    with everyone(with_servers(comm.size - 1, bucket_mib=64.0, layers=4)) as (server, update, core):
        if core is None:
            held = sum(bucket.masters.numel() for bucket in server.buckets)
            buckets, memory = len(server.buckets), server.memory()
            assert memory["optimizer"] == 2 * memory["masters"] == 8 * held
            serve(server, update)
        else:
            held, buckets, memory = None, None, core.sync.memory()
            assert memory["masters"] == memory["optimizer"] == 0
            server_cases.course(core, with_servers(comm.size - 1, bucket_mib=64.0, layers=4))
    shares = [count for count in comm.allgather(held) if count is not None]
    assert max(shares) - min(shares) <= BLOCK * comm.bcast(buckets)


# Milliseconds of every step of three workers, a staleness, and steps at which all wait.
DELAYS = st.lists(st.lists(st.sampled_from([0, 0, 1, 4]), min_size=6, max_size=6), min_size=3, max_size=3)


@pytest.mark.turns(at=(3, 4))
@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("ranks_per_node", [1, 4])
@pytest.mark.parametrize("servers", [1, 2])
def test_nobody_is_further_ahead_than_allowed_and_pulls_are_whole(servers, ranks_per_node, comm, watch, monkeypatch):
    """Random delays: no step begins before everyone has done the steps it must, and weights are all of one version."""
    monkeypatch.setenv("MPILM_RANKS_PER_NODE", str(ranks_per_node))
    servers = min(servers, comm.size - 1)

    @settings(max_examples=12)
    @given(DELAYS, st.sampled_from([0, 1, 2, float("inf")]), st.sampled_from([3, 99]), st.sampled_from(RULES[:2]))
    def check(delays, staleness, every, rule):
        with watch(60):
            saw = play(comm, servers=servers, staleness=staleness, rule=rule, meets=lambda step: step % every == 0,
                       delays=[[delay / 1e3 for delay in one] for one in delays])
        for one in saw:
            for other in saw:
                _check_bound(one, other, staleness, every)
            _check_versions(one, rule, each=1 if staleness else len(saw))
        last = len(saw) * 6 if staleness else 6
        assert {one.versions[-1] for one in saw} == {last}, "not everything was applied, or not everyone has it"

    check()


def _check_bound(one, other, staleness, every):
    """When `one` begins step number `step`, the other has computed all that it must have."""
    for step, begun in enumerate(one.begun):
        meeting = step % every == 0 or step == len(one.begun) - 1
        needed = step if meeting else max(0, step - staleness)
        assert needed == 0 or other.computed[int(needed) - 1] <= begun, f"step {step}, staleness {staleness}"


def _check_versions(one, rule, each=1):
    """An update subtracts as many ones as gradients were summed."""
    assert one.smallest == one.largest, "half an update"
    assert one.versions == sorted(set(one.versions)), "no pull is older than the one before"
    if rule == "none":
        assert one.largest == [-each * version for version in one.versions], "weights of another version than was said"


def test_pulled_weights_in_bf16_are_whole_too(comm):
    """They are rounded by the server, not on the way."""
    saw = play(comm, servers=1, staleness=float("inf"), dtype=torch.bfloat16, delays=[[0.001, 0.0] * 3] * 3)
    for one in saw:
        _check_versions(one, "none")


@pytest.mark.ranks(min=3, max=3)
@pytest.mark.parametrize(("staleness", "ahead"), [(0, 1), (2, 3), (float("inf"), 8)])
def test_the_fast_go_ahead_as_far_as_allowed(staleness, ahead, comm, watch):
    """The last worker computes nothing before another one has begun `ahead` steps: both make progress."""
    last = comm.size - 2

    def before(worker, step):
        if worker == 0 and step == ahead - 1:
            comm.send(None, dest=1 + last)
        if worker == last and step == 0:
            comm.recv(source=1)

    with watch(60):
        saw = play(comm, servers=1, staleness=staleness, before=before, delays=[[0.0] * 8] * (comm.size - 1))
    assert len(saw[last].computed) == 8
    total = sum(saw[0].histogram.values())
    assert total == 8 * len(saw)
    assert (set(saw[0].histogram) == {"0"}) is (staleness == 0)


@pytest.mark.parametrize("rule", RULES)
def test_asynchronous_training_learns(rule, comm):
    """A small batch by heart, as synchronous training does."""
    steps = 24
    config = with_servers(1, staleness="inf", rule=rule, sequences=4)
    config.run.steps = steps
    mine = server_cases.train(config, draw=lambda step: windows(0))
    everywhere(comm, mine is None or mine[0][-1] < mine[0][0] / 2, str(mine and mine[0]))
    if mine is not None:
        weights = [value.numpy().tobytes() for value in mine[2].values()]
        workers = comm.Create_group(comm.group.Excl([0]))
        assert len(set(workers.allgather(b"".join(weights)))) == 1, "the final weights differ"
        workers.Free()


def test_too_many_servers_are_refused(comm):
    """On all ranks, with what would work."""
    for servers in (comm.size, comm.size + 3):
        with pytest.raises(UserError, match=f"nobody would be left.*Start {servers + 1} ranks or more, or give "
                                            f"{comm.size - 1} or fewer"), everyone(with_servers(servers)):
            pass
