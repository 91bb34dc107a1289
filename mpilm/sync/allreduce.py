"""Synchronous data parallelism: gradients are summed over all ranks, then everyone has the same update.

Gradients of a slot are taken from the parameters as the backward pass produces them and summed
in flat buckets. During the last slot a bucket that is full goes to the communication thread,
which reduces it while the backward pass still runs; buckets leave in one fixed order on all ranks.

    backward of my last slot     ... head | block 5 | block 4 | ...
    communication thread                  bucket 0 --> | bucket 1 --> | ...
    step()                                                              wait, norm, update my segment

`collective.owners` share one copy of parameters and optimizer state, and each of them updates
its own segment of it: in a node with shared memory nothing is computed twice.

The ranks of a pipeline hold different parameters and share one gradient norm: it is the sum over the blocks of all
stages, in full precision, so their number does not enter it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from mpilm.comm.node import Node
from mpilm.comm.worker import Inline, Worker
from mpilm.flat import Update
from mpilm.sync._buckets import Bucket, Read
from mpilm.sync._layout import Parameter, lay_out
from mpilm.sync._slots import num_buffers, running_visits, tree_visits

FLOAT_BYTES = 4


class Allreduce:
    """Takes over the memory of `parameters` and keeps it in agreement over all ranks.

    Args:
        parameters: Name -> leaf parameter, in the order of the forward pass; they become views of flat memory.
        decayed: Names of the parameters that weight decay applies to.
        collective: An entry of mpilm.comm.collectives, over the data-parallel communicator.
        stages: The communicator over ranks that hold the other parameters of the same model.
        states: Names of the update's states, one float32 array each.
        num_slots: Micro-batches of this rank in a step.
        dtype: What the model computes with.
        reproducible: Sum slots along the fixed tree; `num_slots` is then a power of two.

    Collective over the collective's communicator and over `stages`, like every method.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decayed: set[str], collective: Any,
                 stages: MPI.Comm, worker: Worker | Inline, *, states: Sequence[str], num_slots: int,
                 dtype: torch.dtype, bucket_mib: float, reproducible: bool) -> None:
        self.worker = worker
        self.owners = Node.build(collective.owners)
        self.visits = (tree_visits if reproducible else running_visits)(num_slots)
        layouts = lay_out([Parameter(name, p.numel(), name in decayed) for name, p in parameters.items()],
                          int(bucket_mib * 2**20 / FLOAT_BYTES), owners=self.owners.comm.size)
        buffers = num_buffers(num_slots) if reproducible else 1
        self.buckets = [Bucket(layout, collective, self.owners, states=states, dtype=dtype, num_buffers=buffers)
                        for layout in layouts]
        self.places = {member.name: (index, member) for index, bucket in enumerate(self.buckets)
                       for member in bucket.layout.members}
        self.missing: set[str] = set()      # parameters that the backward pass in hand has not reached yet
        self.slot = 0
        self._begin_step()
        self.stages = stages
        self.counts = stages.allgather(sum(bucket.blocks.size for bucket in self.buckets))
        self.grad_norm = math.nan
        self.seconds = {"comm_s": 0.0, "optim_s": 0.0}
        self._adopt(parameters)

    def _adopt(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        for name, (index, member) in self.places.items():
            parameter = parameters[name]
            parameter.data = self.buckets[index].weights[member.start:member.start + member.count].view(parameter.shape)
            parameter.register_post_accumulate_grad_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            self._take(name, gradient)
        return take

    def _begin_step(self) -> None:
        self.waiting = [{member.name for member in bucket.layout.members} for bucket in self.buckets]
        self.sent = 0

    def begin_slot(self, slot: int, names: Collection[str]) -> None:
        """The backward pass that comes next is that of this rank's slot number `slot` through the parameters `names`.

        A parameter's slots come in ascending order; those of different parameters may come in between.
        """
        self.slot, self.missing = slot, set(names)

    def end_slot(self) -> None:
        """The backward pass is over: parameters that it did not reach have gradients of zero."""
        for name in sorted(self.missing):
            self._take(name, None)

    def _take(self, name: str, gradient: torch.Tensor | None) -> None:
        index, member = self.places[name]
        self.buckets[index].visit(member, self.visits[self.slot], gradient)
        self.missing.discard(name)
        if self.slot == len(self.visits) - 1:
            self.waiting[index].discard(name)
            self._send_full_buckets()

    def _send_full_buckets(self) -> None:
        while self.sent < len(self.buckets) and not self.waiting[self.sent]:
            self.worker.submit(self.buckets[self.sent].reduce)
            self.sent += 1

    def step(self, update: Update) -> None:
        """Agree on the gradients and update; a NaN or infinite norm leaves everything as it was, on all ranks."""
        started = time.perf_counter()
        self.worker.wait()
        self.owners.comm.Barrier()
        self.grad_norm = math.sqrt(math.fsum(self._all_blocks()))
        self._begin_step()
        reduced = time.perf_counter()
        scale = update.accept(self.grad_norm)
        if scale is not None:
            for bucket in self.buckets:
                update.apply(bucket.flat(), scale)
        updated = time.perf_counter()
        self.owners.comm.Barrier()
        self.seconds = {"comm_s": reduced - started + time.perf_counter() - updated, "optim_s": updated - reduced}

    def _all_blocks(self) -> np.ndarray:
        """The sums of squares of all blocks of all stages. Collective over `stages`."""
        everyone = np.empty(sum(self.counts))
        mine = np.concatenate([np.empty(0), *(bucket.blocks for bucket in self.buckets)])   # a stage may have none
        self.stages.Allgatherv(mine, (everyone, self.counts))
        return everyone

    def load(self, read: Read) -> None:
        """Set parameters and optimizer state from `read(state, parameter, first, count)`."""
        for bucket in self.buckets:
            bucket.load(read)
        self.owners.comm.Barrier()

    def runs(self, part: int, parts: int) -> list[tuple[str, str, int, np.ndarray]]:
        """Share number `part` of everything a resume needs; the `parts` shares cover it exactly once."""
        return [run for bucket in self.buckets for run in bucket.runs(part, parts)]

    def free(self) -> None:
        """Give the communicators back. Collective over the collective's communicator."""
        self.owners.free()
