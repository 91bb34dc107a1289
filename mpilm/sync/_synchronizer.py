"""What synchronizers on flat buckets have in common: gradients taken as they come, one order, one norm, one step.

Gradients of a slot are taken from the parameters as the backward pass produces them and put into
flat buckets. A bucket that is full goes to the communication thread, which reduces it while the
backward pass still runs; buckets leave in one fixed order on all ranks.

    backward of my last slot     ... head | block 5 | block 4 | ...
    communication thread                  bucket 0 --> | bucket 1 --> | ...
    step()                                                              wait, norm, update my segment

The ranks of a pipeline hold different parameters and share one gradient norm: it is the sum over the blocks of all
stages, in full precision, so their number does not enter it. What several of them hold, one counts.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpilm.comm.order import BLOCK
from mpilm.comm.worker import Inline, Worker
from mpilm.flat import Flat, Update
from mpilm.log import UserError
from mpilm.sync._buckets import Bucket, Leaving, Read, Run
from mpilm.sync._departures import Departures

AnyBucket = TypeVar("AnyBucket", bound=Leaving)
SummedBucket = TypeVar("SummedBucket", bound=Bucket)

REHEARSED = 1 << 20     # elements: so many that all threads would share the work


def nothing() -> None:
    """There is nothing to do."""


class Synchronizer(ABC, Generic[AnyBucket]):
    """Takes over the memory of `parameters` and keeps it in agreement over all ranks.

    Args:
        parameters: Name -> leaf parameter; they become views of the buckets' flat memory.
        buckets: Which hold them all, in the order in which they leave.
        num_slots: Micro-batches of this rank in a step.
        every_slot: Buckets leave after every slot, not only after the last.

    Attributes:
        OPTIONS: What of the section `sync` of the configuration the constructor takes, besides what all of them take.

    Collective over the replicas of the parameters, like every method.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], buckets: Sequence[AnyBucket],
                 worker: Worker | Inline, *, num_slots: int, every_slot: bool = False) -> None:
        self.worker, self.buckets = worker, list(buckets)
        self.last_slot, self.every_slot = num_slots - 1, every_slot
        self.places = {member.name: (index, member) for index, bucket in enumerate(self.buckets)
                       for member in bucket.layout.members}
        self.missing: set[str] = set()      # parameters that the backward pass in hand has not reached yet
        self.slot = 0
        self.departures = self._all_departures(self.places)
        self.unfinished: dict[int, Departures] = {}     # of slots whose backward pass has been done in part
        self.grad_norm = math.nan
        self.seconds = {"comm_s": 0.0, "optim_s": 0.0}
        self.hooks: list[Any] = []
        self._adopt(parameters)

    def _adopt(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        for name, (index, member) in self.places.items():
            parameter = parameters[name]
            parameter.data = self.buckets[index].flat[member.start:member.start + member.count].view(parameter.shape)
            self.hooks.append(parameter.register_post_accumulate_grad_hook(self._hook(name)))

    def _hook(self, name: str) -> Any:
        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if name not in self.missing:
                raise UserError(f"The gradient of {name} comes in several parts: layers that have it in common are "
                                "computed again in backward passes of their own. torch.utils.checkpoint: give "
                                "use_reentrant=False.")
            self._take(name, gradient)
        return take

    def _all_departures(self, names: Collection[str]) -> Departures:
        return Departures((self.places[name][0], name) for name in names)

    def around(self, module: torch.nn.Module, run: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        """run(x, *rest): the forward pass of `module`, with its weights there for it and for its backward pass."""
        return run(x, *rest)

    def begin_slot(self, slot: int, names: Collection[str], later: Collection[str] = ()) -> None:
        """The backward pass that comes next is that of this rank's slot number `slot` through the parameters `names`.

        Those of `later` come in another pass of that slot. A parameter's slots come in ascending order; those of
        different parameters may come in between.
        """
        self.slot, self.missing = slot, set(names)
        if self.every_slot:
            begun = slot in self.unfinished
            self.departures = self.unfinished.pop(slot) if begun else self._all_departures({*names, *later})
            if later:
                self.unfinished[slot] = self.departures

    def end_slot(self) -> None:
        """The backward pass is over: parameters that it did not reach have gradients of zero."""
        for name in sorted(self.missing):
            self._take(name, None)

    def _take(self, name: str, gradient: torch.Tensor | None) -> None:
        index, member = self.places[name]
        self.buckets[index].gradients.visit(member, self.slot, gradient)
        self.missing.discard(name)
        if self.every_slot or self.slot == self.last_slot:
            for full in self.departures.note(index, name):
                self._send(self.buckets[full])

    def _send(self, bucket: AnyBucket) -> None:
        work = bucket.depart(self.slot, last=self.slot == self.last_slot)
        bucket.gradients.departed(self.slot, self.worker.submit(work))

    @abstractmethod
    def step(self, update: Update, commit: Callable[[], None] = nothing) -> None:
        """Agree on the gradients and update; a NaN or infinite norm leaves everything as it was, on all ranks.

        Args:
            commit: Called once, when this rank has all that the update needs and has changed nothing yet. What it
                raises is raised here.
        """

    def inherit(self, alive: MPI.Group) -> bool:
        """Ranks have died. Finish what they left half done, and say whether those of `alive` hold all parameters and
        optimizer state of the replicas, which `runs` then offers in any number of shares. Local."""
        return False

    def done(self, step: int) -> float:
        """Steps of the whole batch that all replicas together have done when this one has done `step`."""
        return step

    def told(self) -> dict[str, Any]:
        """What there is to say in the metrics besides."""
        return {}

    def abandon(self) -> None:
        """Take no gradients any more, and end the communication thread, without asking other ranks: they may be gone.
        Local."""
        self.worker.close()
        for hook in self.hooks:     # which torch holds where no garbage collector looks
            hook.remove()

    @abstractmethod
    def load(self, read: Read) -> None:
        """Set parameters and optimizer state from `read(state, parameter, first, count)`."""

    @abstractmethod
    def runs(self, part: int, parts: int) -> list[Run]:
        """Share number `part` of everything a resume needs; the `parts` shares cover it exactly once.

        The shares are those of the replicas: `part` is this rank's number among them.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """For the time of this block the parameters are those that `runs` tells: for whoever evaluates."""
        return nullcontext()

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds: "weights", "masters" (beside them), "optimizer", "gradients". What ranks have in
        common counts in equal parts to each."""

    def free(self) -> None:
        """Give back communicators of its own, if it has any. Collective over the collective's communicator."""


class Summing(Synchronizer[SummedBucket]):
    """Sums gradients over ranks, and updates its own segment of every bucket.

    Args:
        parameters, buckets, worker, num_slots, every_slot: As Synchronizer.
        stages: The communicator over ranks that hold the other parameters of the same model.

    Collective over the replicas of the parameters and over `stages`, like every method.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], buckets: Sequence[SummedBucket], stages: MPI.Comm,
                 worker: Worker | Inline, *, num_slots: int, every_slot: bool = False) -> None:
        super().__init__(parameters, buckets, worker, num_slots=num_slots, every_slot=every_slot)
        self.stages = stages
        self.rehearsed = False
        self.norm_s = 0.0       # of a norm, what is not waiting
        self.counts: list[int] = stages.allgather(sum(bucket.layout.count for bucket in self.buckets))

    def step(self, update: Update, commit: Callable[[], None] = nothing) -> None:
        """As Synchronizer."""
        started = time.perf_counter()
        self.worker.wait()
        scale = self._accept(update)
        self.departures = self._all_departures(self.places)
        if scale is not None:
            self._rehearse(update, scale)
        commit()
        reduced = time.perf_counter()
        if scale is not None:
            self._update(lambda flat: update.apply(flat, scale))
        updated = time.perf_counter()
        self._agree()
        optim_s = updated - reduced + self.norm_s
        self.seconds = {"comm_s": time.perf_counter() - started - optim_s, "optim_s": optim_s}

    def _accept(self, update: Update) -> float | None:
        """What gradients are multiplied by; None if the step must be skipped, on all ranks. Sets `grad_norm`."""
        self.grad_norm = self._norm()
        return update.accept(self.grad_norm)

    def _rehearse(self, update: Update, scale: float) -> None:
        """Have compiled what the first update compiles, on copies: what fails then has changed nothing. Local."""
        if self.rehearsed or not update.adds:
            return
        self.rehearsed = True
        kinds = {len(flat.gradients): flat for bucket in self.buckets for flat in bucket.flats()}
        for flat in kinds.values():
            update.apply(flat.part(slice(0, REHEARSED)).copy(), scale)

    def _norm(self) -> float:
        """Of the gradients that the ranks of all stages have before them. Collective over `stages`."""
        return math.sqrt(math.fsum(self._all_blocks()))

    def _all_blocks(self) -> np.ndarray:
        """The sums of squares of all blocks of all stages. Collective over `stages`."""
        self._square()
        mine = self._blocks()
        counts = [count // BLOCK for count in self.counts]
        everyone = np.empty(sum(counts))
        self.stages.Allgatherv(mine, (everyone, counts))
        return everyone

    def _square(self) -> None:
        """Make those sums of squares that were not made while gradients were summed."""
        started = time.perf_counter()
        for bucket in self.buckets:
            bucket.square_late()
        self.norm_s = time.perf_counter() - started

    def _update(self, apply: Callable[[Flat], None]) -> None:
        """Update my segment of every bucket. Local, and cannot fail."""
        for bucket in self.buckets:
            for flat in bucket.flats():
                apply(flat)
            self._updated(bucket)

    @abstractmethod
    def _blocks(self) -> np.ndarray:
        """The sums of squares of all blocks of all buckets, from all ranks that hold them; float64."""

    def _updated(self, bucket: SummedBucket) -> None:
        """My segment of `bucket` is new."""

    @abstractmethod
    def _agree(self) -> None:
        """Return when the new parameters are everywhere."""
