"""The executor: runs any schedule's list of passes over the slots of a batch, whatever the number of stages.

    rank 0   F0 F1 B0 F2 B1 B2          a pass takes what it needs from the messages, computes, and sends on
    rank 1      F0 B0 F1 B1 F2 B2       what it has made; the last stage has the losses

With one stage this is gradient accumulation: F0 B0 F1 B1 ... A slot's loss is divided by the number of slots of the
global batch before the backward pass, so that the sum over slots and ranks is the gradient of the mean loss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpilm.data.loader import Batch
from mpilm.model.gpt import GPT
from mpilm.parallel import routes, schedules
from mpilm.parallel.deferred import Deferred, Half
from mpilm.parallel.messages import Messages
from mpilm.parallel.schedules import Action, Kind, Schedule


class Slots(Protocol):
    """Whoever collects gradients wants to know which slot they belong to."""

    def begin_slot(self, slot: int, names: Collection[str]) -> None:
        """The next backward pass is that of my slot number `slot`; it gives the gradients of the parameters `names`."""

    def end_slot(self) -> None:
        """That backward pass is over."""


class Pipeline:
    """This rank's chunks of the model, and the schedule by which they work. Collective over `comm`, like every method.

    Args:
        chunks: Parts of the model, in order; chunk c is stage c * comm.size + comm.rank.
        slots: Whom the gradients are for.
        comm: The ranks that hold the stages.
        schedule: An entry of schedules.MENU.
        num_slots: Slots of the global batch, over all ranks.
        dtype: Of activations.
    """

    def __init__(self, chunks: Sequence[GPT], slots: Slots, comm: MPI.Comm, schedule: Schedule, *, num_slots: int,
                 dtype: torch.dtype) -> None:
        self.chunks, self.slots, self.comm, self.schedule, self.num_slots = chunks, slots, comm, schedule, num_slots
        self.stages = comm.size * len(chunks)
        self.messages = Messages(comm, dtype)
        self.deferred = [Deferred(chunk) for chunk in chunks] if schedule.split else []
        self.names = [{name for name, _ in chunk.named_parameters()} for chunk in chunks]
        self.passes = {Kind.FORWARD: self._forward, Kind.BACKWARD: self._backward, Kind.INPUT: self._input,
                       Kind.WEIGHT: self._weight}
        self._begin([])

    @property
    def wait_s(self) -> float:
        """Seconds of the last `run` in which this rank waited for other stages: its bubble, and messages."""
        return self.messages.wait_s

    def run(self, batch: Batch) -> np.ndarray:
        """Forward and backward of all my slots; their losses, float64, nats per token, on the last stage (else 0)."""
        actions = self.schedule.actions(self.comm.rank, self.comm.size, len(batch.inputs), len(self.chunks))
        return self._play(actions, batch)

    def evaluate(self, batch: Batch) -> np.ndarray:
        """Losses of my slots in evaluation mode, as `run` returns them.

        Blocks record the graph of a backward pass, and it is dropped: so the very code that training compiled is run,
        instead of compiling it once more without gradients.
        """
        actions = list(self.schedule.forward(self.comm.rank, self.comm.size, len(batch.inputs), len(self.chunks)))
        for chunk in self.chunks:
            chunk.eval()
        try:
            return self._play(actions, batch)
        finally:
            for chunk in self.chunks:
                chunk.train()

    def _play(self, actions: list[Action], batch: Batch) -> np.ndarray:
        self._begin(micro_batches(batch))
        keys = (self._needs(action) for action in actions)
        shape = (*batch.inputs.shape[1:], self.chunks[0].shape.width)
        self.messages.expect((key for key in keys if key is not None), shape)
        for deferred in self.deferred:
            deferred.prepare(batch.inputs.shape[1:])
        for action in actions:
            self.passes[action.kind](action)
        self.messages.finish()
        losses = np.zeros(len(self.batch))
        for slot, loss in self.losses.items():
            losses[slot] = loss.item()
        self._begin([])     # graphs of an evaluation are dropped here
        return losses

    def _begin(self, batch: list[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        self.batch = batch
        self.losses: dict[int, Tensor] = {}
        self.graphs: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        self.halves: dict[tuple[int, int], Half] = {}
        if batch:
            self.messages.wait_s = 0.0

    def _forward(self, action: Action) -> None:
        chunk, slot = self.chunks[action.chunk], action.micro_batch
        hidden = self._received(action)
        if hidden is not None:
            hidden.requires_grad_()
        output = chunk(*self.batch[slot], hidden)
        if chunk.last:
            self.losses[slot] = output.detach()
        if chunk.training:
            self.graphs[action.chunk, slot] = (output / self.num_slots if chunk.last else output), hidden
        self._send(action, output)

    def _backward(self, action: Action) -> None:
        output, hidden = self.graphs.pop((action.chunk, action.micro_batch))
        gradient = self._received(action)
        self.slots.begin_slot(action.micro_batch, self.names[action.chunk])
        torch.autograd.backward(output, gradient)
        self.slots.end_slot()
        self._send(action, None if hidden is None else hidden.grad)

    def _input(self, action: Action) -> None:
        output, hidden = self.graphs.pop((action.chunk, action.micro_batch))
        deferred, gradient = self.deferred[action.chunk], self._received(action)
        self.slots.begin_slot(action.micro_batch, deferred.early)
        half = self.halves[action.chunk, action.micro_batch] = deferred.backward(output, gradient, hidden)
        self.slots.end_slot()
        self._send(action, half.input_gradient)

    def _weight(self, action: Action) -> None:
        self.slots.begin_slot(action.micro_batch, self.deferred[action.chunk].late)
        self.halves.pop((action.chunk, action.micro_batch)).weights()
        self.slots.end_slot()

    def _needs(self, action: Action) -> routes.Message | None:
        return routes.needs(action, self.comm.rank, self.comm.size, self.stages)

    def _received(self, action: Action) -> Tensor | None:
        key = self._needs(action)
        return None if key is None else self.messages.receive(key)

    def _send(self, action: Action, tensor: Tensor | None) -> None:
        key = routes.gives(action, self.comm.rank, self.comm.size, self.stages)
        if key is not None:
            assert tensor is not None, f"{action} has nothing to send"
            self.messages.send(key, tensor)


def alone(model: GPT) -> Pipeline:
    """A pipeline of one stage that only evaluates."""
    return Pipeline([model], _Nobody(), MPI.COMM_SELF, schedules.get("1f1b"), num_slots=1,
                    dtype=next(model.parameters()).dtype)


class _Nobody:
    """Takes no gradients."""

    def begin_slot(self, slot: int, names: Collection[str]) -> None: ...

    def end_slot(self) -> None: ...


def micro_batches(batch: Batch) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(inputs, targets, documents) of each slot, [micro_batch_size, sequence_length]."""
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    documents: Iterable[Tensor | None] = ([None] * len(inputs) if batch.documents is None
                                          else torch.from_numpy(batch.documents))
    return list(zip(inputs, targets, documents, strict=True))
