"""Synchronous data parallelism: gradients are summed over all ranks, then everyone has the same update.

A bucket leaves during the backward pass of the last slot, or is summed where it is used (_unsummed.py).
`collective.owners` share one copy of parameters and optimizer state, and each of them updates its own segment of it: in
a node with shared memory nothing is computed twice. Ranks that share no memory each hold a copy of everything and
compute the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from mpilm import ulfm
from mpilm.comm import arrays
from mpilm.comm.node import Node
from mpilm.comm.order import BLOCK, segments
from mpilm.comm.worker import Inline, Worker
from mpilm.flat import FLOAT_BYTES, Flat, Update, bytes_unsummed
from mpilm.sync._buckets import MASTERS, Read, Replica, Run
from mpilm.sync._compressed import Compress
from mpilm.sync._journal import Journal
from mpilm.sync._layout import described, lay_out
from mpilm.sync._slots import num_buffers, running_visits, tree_visits
from mpilm.sync._synchronizer import Summing
from mpilm.sync._unsummed import Unsummed


class Allreduce(Summing[Replica]):
    """Takes over the memory of `parameters` and keeps it in agreement over all ranks.

    Args:
        parameters: Name -> leaf parameter, in the order of the forward pass; they become views of flat memory.
        decayed: Names of the parameters that weight decay applies to.
        collective: An entry of mpilm.comm.collectives, over the data-parallel communicator.
        stages: The communicator over ranks that hold the other parameters of the same model.
        update: Has the states that parameters have memory for.
        compress: How buckets are summed.
        num_slots: Micro-batches of this rank in a step.
        dtype: What the model computes with.
        reproducible: Sum slots along the fixed tree; `num_slots` is then a power of two.
        repeated: Names of the parameters that another rank of `stages` holds too, and counts for the norm.

    Collective over the collective's communicator and over `stages`, like every method.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decayed: set[str], collective: Any,
                 stages: MPI.Comm, worker: Worker | Inline, *, update: Update, compress: Compress, num_slots: int,
                 dtype: torch.dtype, bucket_mib: float, reproducible: bool, repeated: Collection[str] = ()) -> None:
        self.owners = Node.build(collective.owners)
        visits = (tree_visits if reproducible else running_visits)(num_slots)
        most: int = collective.comm.allreduce(self.owners.comm.size, op=MPI.MAX)    # a node may have fewer ranks
        layouts = lay_out(described(parameters, decayed), int(bucket_mib * 2**20 / FLOAT_BYTES), owners=most)
        outlived = ulfm.active() and self.owners.comm.size > 1
        self.journal = Journal(self.owners, len(update.STATES)) if outlived else None
        # What a rank that died has left can be finished from written sums only (`inherit`).
        able = compress.way is None and update.adds and not outlived and bool(bytes_unsummed(
            num_slots, self.owners.comm.size, element=dtype.itemsize, buffers=num_buffers(visits)))
        unsummed = (partial(Unsummed.build, dtype=dtype, num_slots=num_slots)
                    if _need_no_sums(collective, self.owners, num_slots, able=able) else None)
        counts = [layout.count // BLOCK for layout in layouts]
        self.blocks = self.owners.allocate_common(sum(counts), np.float64, collective.device)
        buckets = [Replica(layout, collective, compress(layout, collective, collective.reduce), self.owners,
                           self.blocks[stop - count:stop], states=update.STATES, dtype=dtype, visits=visits,
                           repeated=repeated, unsummed=unsummed, compiled=update.adds)
                   for layout, count, stop in zip(layouts, counts, accumulate(counts), strict=True)]
        super().__init__(parameters, buckets, stages, worker, num_slots=num_slots)
        self.apply: Callable[[Flat], None] | None = None    # what the last update did

    def _update(self, apply: Callable[[Flat], None]) -> None:
        if self.journal is None:
            super()._update(apply)
            return
        self.apply = apply
        self.journal.step += 1
        self.journal.run(self.owners.comm.rank, (flat for bucket in self.buckets for flat in bucket.flats()), apply)

    def inherit(self, alive: MPI.Group) -> bool:
        """As Synchronizer: the first owner alive makes what is left of the last update."""
        owners = self.owners.comm
        left = ulfm.living(owners, alive)
        if self.journal is None or self.apply is None or len(left) == owners.size:
            return True
        dead = [rank for rank in range(owners.size) if rank not in left]
        segments = {rank: [bucket.flats_of(rank) for bucket in self.buckets] for rank in dead}
        if any(flats is None for of_rank in segments.values() for flats in of_rank):
            return False
        if owners.rank == left[0]:
            for rank, of_rank in segments.items():
                self.journal.run(rank, (flat for flats in of_rank for flat in flats or ()), self.apply)
        return True

    def _square(self) -> None:
        if any(isinstance(bucket.gradients, Unsummed) for bucket in self.buckets):
            self.owners.comm.Barrier()      # everyone's gradients are there
        super()._square()

    def _blocks(self) -> np.ndarray:
        self.owners.comm.Barrier()
        return arrays.fetch(self.blocks)

    def _agree(self) -> None:
        self.owners.comm.Barrier()

    def load(self, read: Read) -> None:
        """As Synchronizer."""
        for bucket in self.buckets:
            bucket.load(read)
        self.owners.comm.Barrier()

    def runs(self, part: int, parts: int) -> list[Run]:
        """As Synchronizer; any rank could offer any share. All buckets are cut as one, so that a share is few runs."""
        counts = [bucket.layout.count for bucket in self.buckets]
        share = segments(sum(counts), parts)[part]
        return [run for bucket, stop in zip(self.buckets, accumulate(counts), strict=True)
                for run in bucket.runs(share, first=stop - bucket.layout.count)]

    def memory(self) -> dict[str, int]:
        """As Synchronizer."""
        owners = self.owners.comm.size
        common = [bucket.common for bucket in self.buckets]
        masters = sum(arrays[MASTERS].nbytes for arrays in common)
        weights = sum(bucket.flat.nbytes for bucket in self.buckets)
        apart = any(bucket.flat.dtype != torch.float32 for bucket in self.buckets)
        return {"weights": weights // owners, "masters": masters // owners if apart else 0,
                "optimizer": sum(array.nbytes for arrays in common for array in arrays.values()) // owners
                - masters // owners,
                "gradients": sum(bucket.gradients.nbytes for bucket in self.buckets)}

    def free(self) -> None:
        """As Synchronizer."""
        self.owners.free()


def _need_no_sums(collective: Any, owners: Node, num_slots: int, *, able: bool) -> bool:
    """Whether gradients can be used unsummed; the same on all ranks, who may have different numbers of slots.
    Collective over the collective's communicator."""
    together = owners.comm.size == collective.comm.size
    told: list[tuple[int, bool]] = collective.comm.allgather((num_slots, able and together))
    return told == [(num_slots, True)] * len(told)
