"""Synchronous data parallelism: gradients are summed over all ranks, then everyone has the same update.

Gradients of a slot are taken from the parameters as the backward pass produces them and summed
in flat buckets. During the last slot a bucket that is full goes to the communication thread,
which reduces it while the backward pass still runs; buckets leave in one fixed order on all ranks.

    backward of my last slot     ... head | block 5 | block 4 | ...
    communication thread                  bucket 0 --> | bucket 1 --> | ...
    step()                                                              wait, norm, update my segment

`collective.owners` share one copy of parameters and optimizer state, and each of them updates
its own segment of it: in a node with shared memory nothing is computed twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from mpilm.comm.node import Node
from mpilm.comm.worker import Inline, Worker
from mpilm.flat import Update
from mpilm.sync._buckets import Bucket, Read
from mpilm.sync._layout import Member, Parameter, lay_out
from mpilm.sync._slots import num_buffers, running_visits, tree_visits

FLOAT_BYTES = 4


class Allreduce:
    """Takes over the memory of `parameters` and keeps it in agreement over all ranks.

    Args:
        parameters: Name -> leaf parameter, in the order of the forward pass; they become views of flat memory.
        decayed: Names of the parameters that weight decay applies to.
        collective: An entry of mpilm.comm.collectives, over the data-parallel communicator.
        states: Names of the update's states, one float32 array each.
        num_slots: Micro-batches of this rank in a step.
        dtype: What the model computes with.
        reproducible: Sum slots along the fixed tree; `num_slots` is then a power of two.

    Collective over the collective's communicator, like every method.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decayed: set[str], collective: Any,
                 worker: Worker | Inline, *, states: Sequence[str], num_slots: int, dtype: torch.dtype,
                 bucket_mib: float, reproducible: bool) -> None:
        self.worker = worker
        self.owners = Node.build(collective.owners)
        self.visits = (tree_visits if reproducible else running_visits)(num_slots)
        layouts = lay_out([Parameter(name, p.numel(), name in decayed) for name, p in parameters.items()],
                          int(bucket_mib * 2**20 / FLOAT_BYTES), owners=self.owners.comm.size)
        buffers = num_buffers(num_slots) if reproducible else 1
        self.buckets = [Bucket(layout, collective, self.owners, states=states, dtype=dtype, num_buffers=buffers)
                        for layout in layouts]
        self.missing: list[set[str]] = []
        self.sent = 0
        self.slot = 0
        self.grad_norm = math.nan
        self.seconds = {"comm_s": 0.0, "optim_s": 0.0}
        self._adopt(parameters)

    def _adopt(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        for index, bucket in enumerate(self.buckets):
            for member in bucket.layout.members:
                parameter = parameters[member.name]
                parameter.data = bucket.weights[member.start:member.start + member.count].view(parameter.shape)
                parameter.register_post_accumulate_grad_hook(self._hook(index, member))

    def _hook(self, index: int, member: Member) -> Any:
        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            self._take(index, member, gradient)
        return take

    def begin_slot(self, slot: int) -> None:
        """The backward pass that comes next belongs to this rank's slot number `slot`."""
        self.slot = slot
        self.missing = [{member.name for member in bucket.layout.members} for bucket in self.buckets]
        self.sent = 0

    def end_slot(self) -> None:
        """The backward pass is over: parameters that it did not reach have gradients of zero."""
        for index, bucket in enumerate(self.buckets):
            for member in bucket.layout.members:
                if member.name in self.missing[index]:
                    self._take(index, member, None)

    def _take(self, index: int, member: Member, gradient: torch.Tensor | None) -> None:
        self.buckets[index].visit(member, self.visits[self.slot], gradient)
        self.missing[index].discard(member.name)
        if self.slot == len(self.visits) - 1:
            self._send_full_buckets()

    def _send_full_buckets(self) -> None:
        while self.sent < len(self.buckets) and not self.missing[self.sent]:
            self.worker.submit(self.buckets[self.sent].reduce)
            self.sent += 1

    def step(self, update: Update) -> None:
        """Agree on the gradients and update; a NaN or infinite norm leaves everything as it was, on all ranks."""
        started = time.perf_counter()
        self.worker.wait()
        self.owners.comm.Barrier()
        self.grad_norm = math.sqrt(math.fsum(chain.from_iterable(bucket.blocks for bucket in self.buckets)))
        reduced = time.perf_counter()
        scale = update.accept(self.grad_norm)
        if scale is not None:
            for bucket in self.buckets:
                update.apply(bucket.flat(), scale)
        updated = time.perf_counter()
        self.owners.comm.Barrier()
        self.seconds = {"comm_s": reduced - started + time.perf_counter() - updated, "optim_s": updated - reduced}

    def load(self, read: Read) -> None:
        """Set parameters and optimizer state from `read(state, parameter, first, count)`."""
        for bucket in self.buckets:
            bucket.load(read)
        self.owners.comm.Barrier()

    def runs(self, part: int, parts: int) -> list[tuple[str, str, int, np.ndarray]]:
        """Share number `part` of everything a resume needs; the `parts` shares cover it exactly once."""
        return [run for bucket in self.buckets for run in bucket.runs(part, parts)]
