"""Servers and workers in process: a GPT as `training_cases` has it, and two parameters whose gradients are ones."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from mpilm import assemble
from mpilm.comm.order import BLOCK
from mpilm.comm.roles import Roles
from mpilm.comm.transport import ON_HOST
from mpilm.comm.worker import Worker
from mpilm.config import Optim
from mpilm.launch import session
from mpilm.model.slices import Slices
from mpilm.optim import Sgd
from mpilm.state import TrainState, values
from mpilm.sync._clocks import Clocks
from mpilm.sync._compressed import Compress
from mpilm.sync._server import Server
from mpilm.sync.parameter_server import ParameterServer
from tests.training_cases import VOCAB, arithmetic, configuration, course, windows


def with_servers(servers, *, staleness=0, rule="none", **options):
    """`training_cases.configuration` with servers."""
    config = configuration(kind="parameter_server", reproducible=staleness == 0, **options)
    config.sync.servers, config.sync.staleness, config.sync.staleness_rule = servers, staleness, rule
    return config


@contextmanager
def everyone(config, *, precision="fp32", transport=ON_HOST):
    """(server, update, None) on servers, (None, None, core) on workers, with initial weights."""
    with session() as world:
        shape, decided = assemble.shape_of(config, VOCAB), arithmetic(config, precision)
        roles = assemble.assign(config, world, transport.device)
        if roles.serving:
            read = values(Slices(shape), config.run.seed, None)
            yield *assemble.serve(config, shape, decided, roles, TrainState(), read), None
        else:
            core = assemble.build(config, world, shape, decided, roles, transport)
            assemble.restore(core, shape, config, None)
            yield None, None, core
        world.comm.Barrier()


def train(config, *, precision="fp32", draw=windows, transport=ON_HOST):
    """All steps: (losses, norms, weights) on workers, on servers None."""
    with everyone(config, precision=precision, transport=transport) as (server, update, core):
        if core is not None:
            return course(core, config, draw)
        serve(server, update)
        return None


def serve(server, update):
    """Until the last step is done and everything has arrived."""
    while not server.clocks.over:
        server.serve(update)
    server.finish()


@dataclass
class Seen:
    """What a worker saw at the beginning of each of its steps, and when it began to compute gradients."""

    begun: list[float] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    smallest: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    histogram: dict[str, int] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)
    lost: float = 0.0


def play(comm, *, servers, staleness, delays, meets=lambda step: False, before=lambda worker, step: None,
         rule="none", dtype=torch.float32, way=None, warmup=0):
    """Steps in which every update subtracts one from every weight, so that weights tell their version.

    Args:
        delays: [worker][step] seconds that computing takes.
        before: Called before a step is computed.
        way, warmup: What gradients are pushed as, and after how many updates.

    Returns:
        What every worker saw.
    """
    steps = len(delays[0])
    roles = Roles.build(comm, servers=servers)
    parameters = {"a.weight": nn.Parameter(torch.empty(4, BLOCK, dtype=dtype)),
                  "b.bias": nn.Parameter(torch.empty(7, dtype=dtype))}
    update = Sgd(Optim(lr=1.0, min_lr=1.0, warmup_steps=0, weight_decay=0.0, clip=0.0), steps)
    seen, compress = None, Compress(way, warmup, lambda: update.applied)
    if roles.serving:
        clocks = Clocks(roles.workers, staleness=staleness, start=0, steps=steps, meets=meets)
        server = Server(parameters, {"a.weight"}, roles, clocks, rule=rule, compress=compress, states=(),
                        dtype=dtype, bucket_mib=0.01)
        server.load(lambda state, name, first, count: np.zeros(count, np.float32), update)
        serve(server, update)
    else:
        worker = Worker("test")
        sync = ParameterServer(parameters, {"a.weight"}, roles, MPI.COMM_SELF, worker, update=update,
                               compress=compress, num_slots=1, dtype=dtype, bucket_mib=0.01,
                               reproducible=False)
        seen = Seen()
        _work(sync, parameters, update, seen, delays[roles.side.rank], lambda step: before(roles.side.rank, step))
        worker.close()
    everyone_saw = [one for one in comm.allgather(seen) if one is not None]
    roles.free()
    return everyone_saw


def _work(sync, parameters, update, seen, delays, before):
    sync.load(lambda *_: None)
    for step, delay in enumerate([*delays, None]):
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters.values()])
        seen.begun.append(time.monotonic())
        seen.versions.append(sync.reply.version)
        seen.smallest.append(flat.min().item())
        seen.largest.append(flat.max().item())
        seen.weights.append(flat.double().sum().item())
        if delay is None:
            break
        before(step)
        time.sleep(delay)
        seen.computed.append(time.monotonic())      # gradients leave from here on
        sync.begin_slot(0, sync.places)
        sum(parameter.sum() for parameter in parameters.values()).backward()
        sync.end_slot()
        update.begin(step)
        sync.step(update)
    seen.histogram = sync.told()["staleness_histogram"]
    seen.lost = sum(push.lost.double().sum().item() for bucket in sync.buckets for push in bucket.pushes)
