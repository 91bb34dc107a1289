"""Data parallelism with memory divided over the ranks, after ZeRO (arXiv 1910.02054) and FSDP (arXiv 2304.11277).

    level   of N ranks, each holds
      1     1/N of masters and optimizer states; weights and gradients whole
      2     also 1/N of the gradients, and at full length those of two modules in flight
      3     also 1/N of the weights, and whole those of the module that computes and of the next one

A gradient goes to the rank that owns its segment (reduce-scatter), which alone updates; the new weights go to everyone
(allgather), at level 3 not before a module needs them. Where the collective has memory that a node's ranks share, whole
weights are there once for the node; if that node has all the ranks, level 3 has nothing to gather and keeps them so.

The same bits as `allreduce`: sums are made in the same order. At level 1 a rank sums its slots, then ranks are summed.
From level 2 on nothing waits for later slots: every slot is summed over the ranks as it comes, and the owner adds up
slots, so slots are dealt in turns (see order.turns). That order is the tree's for a power of two of ranks. What is sent
is as much as at level 1 for every slot of a rank, and at level 3 the weights twice for every slot.

Level 1 is what is left where ranks have different numbers of slots, as with three ranks in reproducible mode: they
would not gather and scatter in step. This is said at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpilm.comm import arrays
from mpilm.comm.devices import Array
from mpilm.comm.order import BLOCK, segments
from mpilm.comm.worker import Inline, Worker
from mpilm.flat import Update
from mpilm.log import UserError, say, warn
from mpilm.sync._buckets import Read, Run, Shard
from mpilm.sync._compressed import Compress
from mpilm.sync._gradients import Gradients, Passing, Room, Whole, afterwards
from mpilm.sync._layout import Layout, described, lay_out, lay_out_modules
from mpilm.sync._presence import Presence
from mpilm.sync._slots import running_visits, tree_visits
from mpilm.sync._synchronizer import Summing
from mpilm.sync._weights import Gathered, Kept, Tally, Weights

FLOAT_BYTES = 4
MIB = 2**20
NUM_ROOMS = 2


class Sharded(Summing[Shard]):
    """Takes over the memory of `parameters` and keeps it in agreement over all ranks.

    Args:
        parameters, decayed, collective, stages, update, compress, num_slots, dtype, reproducible, repeated: As
            Allreduce. From level 2 on in reproducible mode this rank's slots are `order.turns`, not `order.runs`.
        bucket_mib: Of buckets at level 1; from level 2 on a bucket is a module.
        level: 1, 2 or 3.

    Attributes:
        level: The one that is in effect.

    Collective over the collective's communicator and over `stages`, like every method.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("level",)

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decayed: set[str], collective: Any,
                 stages: MPI.Comm, worker: Worker | Inline, *, update: Update, compress: Compress, num_slots: int,
                 dtype: torch.dtype, bucket_mib: float, reproducible: bool, level: int,
                 repeated: Collection[str] = ()) -> None:
        self.collective, self.compress, self.dtype, self.states = collective, compress, dtype, update.STATES
        self.repeated, self.compiled = repeated, update.adds
        self.level = _possible(level, collective, num_slots)
        self.tally = Tally()
        self.visits = (tree_visits if reproducible else running_visits)(num_slots)
        sizes = described(parameters, decayed)
        layouts = (lay_out(sizes, int(bucket_mib * MIB / FLOAT_BYTES), owners=collective.comm.size)
                   if self.level == 1 else lay_out_modules(sizes, owners=collective.comm.size))
        self.rooms = self._build_rooms(layouts, worker)
        comm = collective.comm
        owns = [segments(layout.count, comm.size)[comm.rank] for layout in layouts]
        counts = [(own.stop - own.start) // BLOCK for own in owns]
        self.squares = collective.device.zeros(sum(counts), np.float64)
        buckets = [self._build(layout, own, self.squares[stop - count:stop], worker, number)
                   for number, (layout, own, count, stop)
                   in enumerate(zip(layouts, owns, counts, accumulate(counts), strict=True))]
        super().__init__(parameters, buckets, stages, worker, num_slots=num_slots, every_slot=self.level > 1)
        self.presence = self._build_presence(parameters)
        say(f"sharded, level {self.level}: rank 0 holds "
            + ", ".join(f"{nbytes / MIB:.1f} MiB of {kind}" for kind, nbytes in self.memory().items() if nbytes)
            + (", and weights of two modules at a time" if self.presence else ""))

    def _build_rooms(self, layouts: Sequence[Layout], worker: Worker | Inline) -> list[Room]:
        """Buckets take turns in them; none at level 1."""
        turns = [[layout.count for layout in layouts[first::NUM_ROOMS]] for first in range(NUM_ROOMS)]
        return [Room(max(counts), self.collective, worker) for counts in turns if counts and self.level > 1]

    def _build(self, layout: Layout, own: slice, squares: Array, worker: Worker | Inline, number: int) -> Shard:
        comm = self.collective.comm
        gradients: Gradients = (
            self._whole(layout, own) if self.level == 1
            else Passing(layout, self.collective, own, self.visits, self.rooms[number % NUM_ROOMS]))
        gathers = self.level == 3 and self.collective.owners.size < comm.size
        weights: Weights = (
            Gathered(layout.count, own, self.dtype, self.collective, worker, self.tally) if gathers
            else Kept(layout.count, own, self.dtype, self.collective, worker))
        return Shard(layout, own, gradients, weights, squares, states=self.states, repeated=self.repeated,
                     device=self.collective.device, compiled=self.compiled)

    def _whole(self, layout: Layout, own: slice) -> Whole:
        reduce = self.compress(layout, self.collective, afterwards(self.collective.reduce_scatter))
        return Whole(layout, self.collective.allocate, reduce, own, self.visits)

    def _build_presence(self, parameters: Mapping[str, torch.nn.Parameter]) -> Presence | None:
        """None where weights are kept."""
        weights = [bucket.weights for bucket in reversed(self.buckets) if isinstance(bucket.weights, Gathered)]
        last = len(self.buckets) - 1
        places = {id(parameters[name]): last - index for name, (index, _) in self.places.items()}
        return Presence(weights, places) if weights else None

    def around(self, module: torch.nn.Module, run: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        """As Synchronizer."""
        return run(x, *rest) if self.presence is None else self.presence.around(module, run, x, *rest)

    def _send(self, bucket: Shard) -> None:
        if isinstance(bucket.weights, Gathered):
            if not bucket.weights.used:
                raise UserError("--sync.level 3 must be told which part of the model computes, and this model does not "
                                "tell; give --sync.level 2.")
            bucket.weights.release()    # all gradients of the module are there: its backward pass is over
        super()._send(bucket)

    def _blocks(self) -> np.ndarray:
        comm = self.collective.comm
        mine = arrays.fetch(self.squares)
        cuts = [segments(bucket.layout.count, comm.size) for bucket in self.buckets]
        counts = [sum(cut[rank].stop - cut[rank].start for cut in cuts) // BLOCK for rank in range(comm.size)]
        everyone = np.empty(sum(counts))
        comm.Allgatherv(mine, (everyone, counts))
        return everyone

    def _updated(self, bucket: Shard) -> None:
        bucket.weights.changed()

    def _agree(self) -> None:
        self.worker.wait()

    def load(self, read: Read) -> None:
        """As Synchronizer."""
        for bucket in self.buckets:
            bucket.load(read)
            bucket.weights.changed()
        self.worker.wait()

    def runs(self, part: int, parts: int) -> list[Run]:
        """As Synchronizer; a rank can offer its own segments only."""
        comm = self.collective.comm
        assert (part, parts) == (comm.rank, comm.size), f"share {part} of {parts} is not that of rank {comm.rank}"
        return [run for bucket in self.buckets for run in bucket.own_runs()]

    def fetch(self) -> None:
        """Have all weights whole until the next forward pass or update, for whoever reads parameters."""
        for bucket in self.buckets:
            if isinstance(bucket.weights, Gathered):
                bucket.weights.wait()

    def memory(self) -> dict[str, int]:
        """As Synchronizer. Gathered weights count as many as there ever were at once."""
        return {"weights": sum(bucket.weights.nbytes for bucket in self.buckets) + self.tally.most,
                "masters": sum(bucket.weights.own_bytes for bucket in self.buckets),
                "optimizer": sum(state.nbytes for bucket in self.buckets for state in bucket.states.values()),
                "gradients": sum(bucket.gradients.nbytes for bucket in self.buckets)
                + sum(room.memory.nbytes for room in self.rooms)}


def _possible(level: int, collective: Any, num_slots: int) -> int:
    """The level, or 1 where the ranks have different numbers of slots, or 2 on a device that can't give back the memory
    of weights and keep their address; says so."""
    slots = collective.comm.allgather(num_slots)
    if level == 3 and not collective.device.shares:
        warn("--sync.level 3: weights come and go on CPUs only; on GPUs level 2 it is.")
        level = 2
    if level == 1 or len(set(slots)) == 1:
        return level
    warn(f"--sync.level {level}: the ranks have {', '.join(map(str, slots))} micro-batches of a step, and levels above "
         "1 need as many on each: level 1 it is. A power of two of ranks, or with --run.reproducible false any number "
         "that divides the micro-batches of a step, divides more of the memory.")
    return 1
