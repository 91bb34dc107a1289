"""Replicas that train by themselves and are averaged now and then (local SGD), for networks that are slow.

    replica 0   step | step | ... | step |     | step | ...       each with gradients, clipping and optimizer state
    replica 1   step | step | ... | step |     | step | ...       of its own
                  `every` local steps     average

The average is an outer step (_apart.py): with `outer_lr` 1 and `outer_momentum` 0 all go on from the average itself;
DiLoCo (arXiv 2311.08105) has 0.7 and 0.9. Replicas count by their number of slots. Before `local_after` updates every
step is one of allreduce (post-local SGD, arXiv 1808.07217).

`fragments` F > 0 (streaming, arXiv 2501.18512): buckets are dealt to F fragments, and fragment f is sent after local
step number n where n % every == f * every // F. It travels while the next step computes and is merged after it:

    compute     step n | step n+1        | step n+2        ...
    network            | fragment 0 -->  | (merged)             what step n+1 moved is kept on top of the merged anchor

Without fragments all replicas hold the same parameters after an averaging; with them, the same anchors.

A checkpoint holds the average of all replicas: of their parameters and of their optimizers' states, besides the outer
momentum and how far the anchor is from the average. To make it changes nothing in the run. Whoever resumes it, on any
number of ranks and by any kind, begins on all replicas with these averages; what was on its way is not lost, because it
is still in the differences. With `save_replicas` it also holds what each replica has of its own, from where as many
replicas go on as if they had not stopped. Validation evaluates the average. A gradient that is not finite on one
replica skips the step on all.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from mpi4py import MPI

from mpilm.comm import arrays
from mpilm.comm.collectives import nothing_more
from mpilm.comm.worker import Inline, Worker
from mpilm.flat import Update
from mpilm.sync._apart import Apart, Outer
from mpilm.sync._buckets import Read, Run
from mpilm.sync._compressed import Compress
from mpilm.sync._gradients import Reduce, afterwards
from mpilm.sync._layout import Layout, described, lay_out
from mpilm.sync._slots import running_visits, tree_visits
from mpilm.sync._synchronizer import Summing

FLOAT_BYTES = 4


class LocalSgd(Summing[Apart]):
    """Takes over the memory of `parameters`; every rank has its own of everything.

    Args:
        parameters, decayed, collective, stages, compress, num_slots, dtype, reproducible, repeated: As
            Allreduce.
        update: Also says how many updates have been made so far, before `load` already.
        every, local_after, outer_lr, outer_momentum, fragments, save_replicas: See the top of the file.

    Attributes:
        grad_norm: In local steps the mean of the replicas' norms, by which each clips for itself.

    Collective over the collective's communicator and over `stages`, like every method.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("every", "local_after", "outer_lr", "outer_momentum", "fragments",
                                          "save_replicas")

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decayed: set[str], collective: Any,
                 stages: MPI.Comm, worker: Worker | Inline, *, update: Update, compress: Compress, num_slots: int,
                 dtype: torch.dtype, bucket_mib: float, reproducible: bool, every: int, local_after: int,
                 outer_lr: float, outer_momentum: float, fragments: int, save_replicas: bool,
                 repeated: Collection[str] = ()) -> None:
        self.comm, self.update = collective.comm, update
        self.every, self.local_after, self.fragments = every, local_after, fragments
        self.save_replicas = save_replicas
        all_slots = sum(self.comm.allgather(num_slots))
        self.gain = all_slots / num_slots   # gradients are parts of the mean over all slots, and local ones of mine
        sizes = described(parameters, decayed)
        most = min(bucket_mib * 2**20 / FLOAT_BYTES, sum(p.count for p in sizes) / max(1, fragments))
        outer = Outer(outer_lr, outer_momentum)
        buckets = [Apart(layout, collective, self._reduce(layout, collective, compress), compress, outer,
                         share=num_slots / all_slots, states=update.STATES, dtype=dtype, compiled=update.adds,
                         visits=(tree_visits if reproducible else running_visits)(num_slots), repeated=repeated)
                   for layout in lay_out(sizes, int(most), owners=1)]
        super().__init__(parameters, buckets, stages, worker, num_slots=num_slots)
        self.travelling: list[Apart] = []

    def _reduce(self, layout: Layout, collective: Any, compress: Compress) -> Reduce:
        """Sums gradients where the step in hand is not a local one. `applied` changes only when all this is done."""
        here = afterwards(lambda buffer: None)
        if not self.local_after:
            return here
        reduce = compress(layout, collective, afterwards(collective.allreduce))
        return lambda buffer, then=nothing_more: (here if self._local() else reduce)(buffer, then)

    def _local(self) -> bool:
        """Whether the next update is a local one."""
        return self.update.applied >= self.local_after

    def _together(self) -> bool:
        """Whether all replicas have the same: not even their optimizers have parted."""
        return self.update.applied <= self.local_after

    def _blocks(self) -> np.ndarray:
        return np.concatenate([np.empty(0), *(arrays.fetch(bucket.squares) for bucket in self.buckets)])

    def _accept(self, update: Update) -> float | None:
        self.before = update.applied
        if not self._local():
            return super()._accept(update)
        norms = np.empty(self.comm.size)
        norms[self.comm.rank] = mine = self.gain * self._norm()
        self.comm.Allgather(MPI.IN_PLACE, norms)
        self.grad_norm = float(norms.mean())
        scale = update.accept(mine if math.isfinite(self.grad_norm) else self.grad_norm)
        return None if scale is None else scale * self.gain

    def _agree(self) -> None:
        """Merge what has arrived during this step; send what is due after it."""
        self._merge()
        number = self.update.applied - self.local_after
        if self.update.applied == self.before or number < 0:     # nothing new, or nothing local yet
            return
        if number == 0:
            for bucket in self.buckets:
                bucket.agree()
            return
        self._send_due(number)
        if not self.fragments:
            self.worker.wait()
            self._merge()

    def _send_due(self, number: int) -> None:
        """After local step `number`, from 1."""
        parts = max(1, self.fragments)
        for place, bucket in enumerate(self.buckets):
            if number % self.every == place % parts * self.every // parts:
                bucket.take()
                self.worker.submit(bucket.total, bucket.difference)
                self.travelling.append(bucket)

    def _merge(self) -> None:
        for bucket in self.travelling:
            bucket.merge()
        self.travelling = []

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """As Synchronizer."""
        number = self.update.applied - self.local_after
        if number <= 0 or (not self.fragments and number % self.every == 0):
            yield
            return
        self.worker.wait()
        kept = [bucket.flat.clone() for bucket in self.buckets]
        for bucket in self.buckets:
            bucket.flat.copy_(bucket.average())
        try:
            yield
        finally:
            for bucket, weights in zip(self.buckets, kept, strict=True):
                bucket.flat.copy_(weights)

    def load(self, read: Read) -> None:
        """As Synchronizer."""
        for bucket in self.buckets:
            bucket.load(read)
            if not self._together():
                bucket.load_mine(read)
        self.travelling = [bucket for bucket in self.buckets if bucket.taken is not None]

    def runs(self, part: int, parts: int) -> list[Run]:
        """As Synchronizer; a rank can offer its own share only."""
        assert (part, parts) == (self.comm.rank, self.comm.size), f"share {part} of {parts} is not that of this rank"
        self.worker.wait()
        together = self._together()
        own = self.save_replicas and not together
        return [run for bucket in self.buckets
                for run in [*bucket.runs(together=together), *(bucket.own_runs() if own else [])]]

    def free(self) -> None:
        """As Synchronizer; nothing is on its way afterwards."""
        self.worker.wait()

    def memory(self) -> dict[str, int]:
        """As Synchronizer. Anchors and outer momentum count as the optimizer's, differences as gradients."""
        buckets = self.buckets
        return {"weights": sum(bucket.flat.nbytes for bucket in buckets),
                "masters": sum(bucket.masters.nbytes for bucket in buckets if bucket.flat is not bucket.masters),
                "optimizer": sum(array.nbytes for bucket in buckets for array in bucket.arrays().values())
                - sum(bucket.masters.nbytes for bucket in buckets),
                "gradients": sum(bucket.gradients.nbytes + bucket.difference.nbytes for bucket in buckets)}
