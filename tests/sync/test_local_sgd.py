"""Replicas that train by themselves: against plain torch, on any number of ranks, and what they leave behind."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mpilm.comm.p2p import Traffic
from mpilm.launch import session
from mpilm.log import UserError
from mpilm.options import parse
from mpilm.parallel import layout
from tests import hybrid_cases
from tests.helpers import everywhere, same_everywhere
from tests.sync.test_resharding import step
from tests.training_cases import build, configuration

STEPS = 7


def local(config, **options):
    """The same with replicas that go their own way."""
    config.sync.kind = "local_sgd"
    for name, value in options.items():
        setattr(config.sync, name, value)
    return config


def layers_of_ones_own(**parallel):
    """A configuration whose update rule is the plainest there is."""
    return hybrid_cases.configuration(clip=0.0, decay=0.0, collective="ring", reproducible=False, **parallel)


def twin(model, options):
    """What STEPS steps make of the average replica, by plain torch on one rank. Returns name -> tensor."""
    config, sync = model.config, model.sync
    runs = layout.slots(config, model.mesh.dp.size, reproducible=False)
    shares = [len(run) / sum(map(len, runs)) for run in runs]
    whole = nn.Sequential(*hybrid_cases.images())
    replicas = [copy.deepcopy(whole) for _ in runs]
    anchors = {name: nn.Parameter(value.detach().clone()) for name, value in whole.named_parameters()}
    outer = {name: torch.optim.SGD([anchor], lr=options["outer_lr"], momentum=options["outer_momentum"],
                                   nesterov=options["outer_momentum"] > 0) for name, anchor in anchors.items()}
    parts = max(1, options["fragments"])
    place = {name: index for held in model.mesh.pp.allgather({n: i for n, (i, _) in sync.places.items()})
             for name, index in held.items()}
    turn = {name: place[name] % parts * options["every"] // parts for name in anchors}
    travelling = {}
    for number in range(1, STEPS + 1):
        ids = model.sampler.ids(number - 1).reshape(-1, model.size)
        for replica, run in zip(replicas, runs, strict=True):
            descend(replica, *[torch.as_tensor(array)[ids[list(run)].reshape(-1)] for array in
                               (model.inputs, model.targets)], lr=config.optim.lr)
        merge(travelling, replicas, anchors, outer, shares)
        for name in [name for name in anchors if number % options["every"] == turn[name]]:
            travelling[name] = [dict(replica.named_parameters())[name].detach().clone() for replica in replicas]
        if not options["fragments"]:
            merge(travelling, replicas, anchors, outer, shares)
    return {name: sum(share * dict(replica.named_parameters())[name].detach()
                      for share, replica in zip(shares, replicas, strict=True)) for name in anchors}


def descend(replica, inputs, targets, *, lr):
    """One step of gradient descent."""
    replica.zero_grad()
    nn.functional.cross_entropy(replica(inputs.float()), targets).backward()
    with torch.no_grad():
        for parameter in replica.parameters():
            parameter.sub_(lr * parameter.grad)


def merge(travelling, replicas, anchors, outer, shares):
    """Outer steps against what was taken; what replicas did since then stays."""
    for name, taken in travelling.items():
        anchors[name].grad = sum(share * (anchors[name].detach() - value)
                                 for share, value in zip(shares, taken, strict=True))
        outer[name].step()
        for replica, value in zip(replicas, taken, strict=True):
            dict(replica.named_parameters())[name].data += anchors[name].detach() - value
    travelling.clear()


@pytest.mark.turns(at=(1, 3))
@pytest.mark.parametrize("options", [
    {"every": 3, "fragments": 0, "outer_lr": 1.0, "outer_momentum": 0.0},
    {"every": 2, "fragments": 0, "outer_lr": 0.7, "outer_momentum": 0.9},
    {"every": 1, "fragments": 1, "outer_lr": 1.0, "outer_momentum": 0.0},
    {"every": 4, "fragments": 3, "outer_lr": 0.7, "outer_momentum": 0.9},
], ids=str)
def test_it_is_what_plain_torch_makes_of_all_replicas(options, comm):
    """Any number of ranks, with different numbers of slots too, and in two stages where they are even."""
    config = local(layers_of_ones_own(pp=2 - comm.size % 2), **options)
    with hybrid_cases.everyone(hybrid_cases.images(), config, optimizer="sgd") as model:
        for _ in range(STEPS):
            model.step()
        found, expected = model.state_dict(), twin(model, options)
        near = {name: float((found[name] - value).abs().max()) for name, value in expected.items()}
        everywhere(comm, max(near.values()) < 1e-6, str(near))


def test_an_average_after_every_step_of_sgd_is_allreduce(comm):
    """But for the rounding of the average: at most an ulp of a weight a step, 2^-22 for weights below 2."""
    def course(config):
        with hybrid_cases.everyone(hybrid_cases.perceptron(), config, optimizer="sgd") as model:
            return hybrid_cases.course(model)

    losses, _, weights, _ = course(layers_of_ones_own())
    mine = course(local(layers_of_ones_own(), every=1))
    np.testing.assert_allclose(mine[0], losses, rtol=1e-6)
    furthest = max(float((mine[2][name] - value).abs().max()) for name, value in weights.items())
    everywhere(comm, furthest <= hybrid_cases.STEPS * 2**-22, f"{furthest}")


def config_of(comm, collective="ring", **options):
    """Of the small model, with as many sequences as three ranks need."""
    return local(configuration(collective, reproducible=False, sequences=8), **options)


def weights(core):
    """All parameters of a rank, in one array."""
    return torch.cat([p.detach().float().flatten() for p in core.parameters().values()]).numpy()


@pytest.mark.turns(at=(1, 3))
@pytest.mark.parametrize("collective", ["ring", "shared", "mpi"])
def test_after_an_average_all_ranks_hold_the_same_bits(collective, comm):
    """And before it they do not; a second run has the same bits again."""
    with session() as world:
        courses = []
        for _ in range(2):
            core = build(config_of(comm, collective, every=2), world, precision="bf16")
            losses = [step(core, 0)]
            held = comm.allgather(weights(core).tobytes())
            everywhere(comm, len(set(held)) == comm.size, "as many models as ranks")
            losses += [step(core, 1)]
            same_everywhere(comm, weights(core))
            courses.append((losses, weights(core).tobytes()))
        everywhere(comm, courses[0] == courses[1] or collective == "mpi", "run to run")
        world.comm.Barrier()


def test_what_is_sent(comm):
    """The parameters, when it is time to; fragments send as much in parts; before the switch every gradient."""
    with session() as world:
        for options, steps in (({"every": 2}, (1, 3)), ({"every": 2, "fragments": 2}, None),
                               ({"every": 2, "local_after": 2}, (0, 1, 3))):
            core = build(config_of(comm, **options), world)
            count = sum(bucket.layout.count for bucket in core.sync.buckets)
            sent = []
            for number in range(4):
                before = Traffic.sent
                step(core, number)
                core.sync.worker.wait()
                sent.append(Traffic.sent - before)
            whole = 4 * count * 2 * (comm.size - 1) / comm.size
            if steps is None:
                everywhere(comm, all(0 <= seen <= whole for seen in sent) and abs(sum(sent) - 2 * whole) < 64 * 4096)
            else:
                wanted = [whole if number in steps else 0 for number in range(4)]
                everywhere(comm, np.allclose(sent, wanted, atol=2 * 65536 * len(core.sync.buckets)), f"{sent} {wanted}")
        world.comm.Barrier()


def test_a_bad_gradient_on_one_replica_skips_the_step_on_all(comm):
    """And nothing is averaged a second time for it."""
    with session() as world:
        core = build(config_of(comm, every=2, outer_momentum=0.9), world)
        for number in range(2):
            step(core, number)
        before = weights(core).copy()
        norm = core.parts[-1].norm.weight
        poison = norm.register_hook(lambda g: g * np.nan) if comm.rank == comm.size - 1 else None
        _, seen = step(core, 2)
        everywhere(comm, np.isnan(seen) and (core.update.applied, core.update.skipped) == (2, 1))
        everywhere(comm, np.array_equal(weights(core), before), "nothing has changed")
        if poison:
            poison.remove()
        everywhere(comm, bool(np.isfinite(step(core, 3)[1])))
        world.comm.Barrier()


@pytest.mark.serial
@pytest.mark.parametrize(("options", "words"), [
    ({}, "--run.reproducible false"),
    ({"run.reproducible": "false", "parallel.cp": 2}, "--parallel.cp 1"),
    ({"run.reproducible": "false", "sync.every": 2, "sync.fragments": 3}, "--sync.every 2"),
    ({"run.reproducible": "false", "sync.every": 0}, "sync.every 0: give a whole number from 1"),
    ({"run.reproducible": "false", "sync.outer_momentum": 1}, "from 0 to below 1"),
])
def test_what_makes_no_sense_is_refused_with_the_remedy(options, words):
    """Before anything is built."""
    argv = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    with pytest.raises(UserError, match=words):
        parse(["--sync.kind", "local_sgd", *argv])
