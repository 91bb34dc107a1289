"""Servers and workers without a model: gradients of any size that are there at once, or after a sleep.

    bare        what cannot be done without: rank 0 receives float32 from all others, adds, and sends bf16 back
    Emulation   the same bytes through sync/, with AdamW on rank 0
    pace        steps/s of workers that sleep instead of computing, one of them longer, under a bound on staleness
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI

from mpilm.comm import arrays, p2p
from mpilm.comm.roles import Roles
from mpilm.comm.worker import Worker
from mpilm.config import Optim
from mpilm.optim import Update
from mpilm.sync._clocks import Clocks
from mpilm.sync._compressed import Compress
from mpilm.sync._server import Server
from mpilm.sync.parameter_server import ParameterServer

ENDLESS = 2**40
BUCKET_MIB = 8.0
TAG = 1
MANY = 16           # parameters, so that they fill several buckets as a model's would


class Emulation:
    """A server on rank 0, workers on the others, and `count` parameters in bf16. Collective over `comm`."""

    def __init__(self, comm: MPI.Comm, count: int, *, staleness: float = 0, steps: int = ENDLESS) -> None:
        self.roles = Roles.build(comm, servers=1)
        parameters = {f"{number}.weight": torch.nn.Parameter(torch.zeros(count // MANY, dtype=torch.bfloat16))
                      for number in range(MANY)}
        self.update = Update(Optim(lr=1e-5, warmup_steps=0), ENDLESS)
        self.server: Server | None = None
        if self.roles.serving:
            clocks = Clocks(self.roles.workers, staleness=staleness, start=0, steps=steps, meets=lambda step: False)
            self.server = Server(parameters, set(parameters), self.roles, clocks, rule="none",
                                 compress=Compress(), states=self.update.STATES, dtype=torch.bfloat16,
                                 bucket_mib=BUCKET_MIB)
            self.server.load(lambda state, name, first, count: np.zeros(count, np.float32), self.update)
        else:
            self.worker = Worker("push")
            self.sync = ParameterServer(parameters, set(parameters), self.roles, MPI.COMM_SELF, self.worker,
                                        update=self.update, compress=Compress(), num_slots=1, dtype=torch.bfloat16,
                                        bucket_mib=BUCKET_MIB, reproducible=False)
            self.sync.load(lambda *_: np.empty(0))

    def step(self) -> None:
        """An update on the server, push and pull on a worker."""
        if self.server is not None:
            self.server.serve(self.update)
            self.server.drain()
            return
        for bucket in self.sync.buckets:
            self.worker.submit(bucket.depart(0, last=True))
        self.sync.step(self.update)

    def free(self) -> None:
        """Collective over `comm`."""
        if self.server is None:
            self.worker.close()
        else:
            self.server.finish()
        self.roles.free()


def bare(comm: MPI.Comm, count: int) -> Callable[[], None]:
    """A round of the same bytes with nothing but MPI and NumPy, a bucket after the other."""
    size = min(count, int(BUCKET_MIB * 2**18))
    gradients = [arrays.zeros(count, np.float32) for _ in range(max(1, comm.size - 1) if comm.rank == 0 else 1)]
    weights = arrays.zeros(count, np.uint16)
    parts = list(arrays.chunks(0, count, size))

    def serve() -> None:
        ledger = p2p.Ledger()
        coming = [[ledger.receive(comm, mine[part], source=rank, tag=TAG) for rank, mine in enumerate(gradients, 1)]
                  for part in parts]
        for part, requests in zip(parts, coming, strict=True):
            p2p.wait(requests)
            for other in gradients[1:]:
                np.add(gradients[0][part], other[part], out=gradients[0][part])
        for part in parts:
            for rank in range(1, comm.size):
                ledger.send(comm, weights[part], dest=rank, tag=TAG)
        ledger.wait()

    def work() -> None:
        ledger = p2p.Ledger()
        for part in parts:
            ledger.send(comm, gradients[0][part], dest=0, tag=TAG)
        for part in parts:
            ledger.receive(comm, weights[part], source=0, tag=TAG)
        ledger.wait()

    return serve if comm.rank == 0 else work


@dataclass(frozen=True)
class Pace:
    """How long workers sleep.

    Args:
        steps: Of each worker.
        sleep_s: For a step.
        slow: A slow step takes so many times as long.
        anyone: Every worker has slow steps now and then, as many in all as there would be if one were always slow;
            else the last worker is.
    """

    steps: int
    sleep_s: float
    slow: float
    anyone: bool = False

    def of(self, worker: int, workers: int) -> list[float]:
        """Seconds of each step of a worker; the same in every run."""
        draw = random.Random(worker)
        late = [draw.random() < 1 / workers if self.anyone else worker == workers - 1 for _ in range(self.steps)]
        return [self.sleep_s * (self.slow if slow else 1.0) for slow in late]


def pace(comm: MPI.Comm, count: int, staleness: float, plan: Pace) -> float:
    """Steps/s of all workers together: each one's until its last step was computed. Collective over `comm`."""
    emulation = Emulation(comm, count, staleness=staleness, steps=plan.steps)
    rate = 0.0
    comm.Barrier()
    started = time.perf_counter()
    if emulation.server is not None:
        while not emulation.server.clocks.over:
            emulation.server.serve(emulation.update)
        emulation.server.drain()
    else:
        side = emulation.roles.side
        for sleep_s in plan.of(side.rank, side.size):
            time.sleep(sleep_s)
            rate = plan.steps / (time.perf_counter() - started)
            emulation.step()
    emulation.free()
    return float(comm.allreduce(rate))


def choices() -> Sequence[tuple[str, float]]:
    """The bounds that are compared, with their names."""
    return [("mpilm-s0", 0), ("mpilm-s1", 1), ("mpilm-s4", 4), ("mpilm-inf", float("inf"))]
