"""The executor: runs any schedule's list of passes over the slots of a batch, whatever the number of stages.

    rank 0   F0 F1 B0 F2 B1 B2          a pass takes what it needs from the messages, computes, and sends on
    rank 1      F0 B0 F1 B1 F2 B2       what it has made; the last stage has the losses

With one stage this is gradient accumulation: F0 B0 F1 B1 ... A slot's loss is divided by the number of slots of the
global batch (and of ranks that share it) before the backward pass, so that the sum over slots and ranks is the gradient
of the mean loss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpilm.comm.transport import ON_HOST, Transport
from mpilm.data.loader import Batch
from mpilm.model.gpt import GPT
from mpilm.model.seed import seed
from mpilm.parallel import routes, schedules
from mpilm.parallel.chunk import Chunk
from mpilm.parallel.deferred import Deferred, Half
from mpilm.parallel.losses import SlotLosses
from mpilm.parallel.messages import Messages
from mpilm.parallel.schedules import Action, Kind, Schedule


class Slots(Protocol):
    """Whoever collects gradients wants to know which slot they belong to."""

    def begin_slot(self, slot: int, names: Collection[str], later: Collection[str] = ()) -> None:
        """The next backward pass is that of my slot number `slot`; it gives the gradients of the parameters `names`.

        Those of `later` come in another pass of that slot; passes of other slots may come in between.
        """

    def end_slot(self) -> None:
        """That backward pass is over."""


class Pipeline:
    """This rank's chunks of the model, and the schedule by which they work. Collective over `comm`, like every method.

    Args:
        chunks: Parts of the model, in order; chunk c is stage c * comm.size + comm.rank.
        slots: Whom the gradients are for.
        comm: The ranks that hold the stages.
        schedule: An entry of schedules.MENU.
        num_slots: What a slot's loss is divided by: slots of the global batch, over all ranks, times the ranks that
            share each sequence, because every one of them has the mean loss of its own tokens.
        dtype: Of activations.
        transport: Of the device that the chunks are on.
        device: That device, for torch, where nothing is sent; else the transport's.
    """

    def __init__(self, chunks: Sequence[Chunk], slots: Slots, comm: MPI.Comm, schedule: Schedule, *, num_slots: int,
                 dtype: torch.dtype, transport: Transport = ON_HOST, device: str = "") -> None:
        self.chunks, self.slots, self.comm, self.schedule, self.num_slots = chunks, slots, comm, schedule, num_slots
        self.stages = comm.size * len(chunks)
        self.device, self.torch = transport.device, device or transport.device.torch
        self.messages = Messages(comm, dtype, transport)
        self.deferred = [Deferred(chunk, chunk.linear_rows()) for chunk in chunks] if schedule.split else []
        self.names = [{name for name, _ in chunk.named_parameters()} for chunk in chunks]
        self.passes = {Kind.FORWARD: self._forward, Kind.BACKWARD: self._backward, Kind.INPUT: self._input,
                       Kind.WEIGHT: self._weight}
        self.played = 0     # passes of all runs so far: a sign of life
        self.ran = (self.device.stamp(),) * 2   # the last run's beginning and end
        self._begin([])

    @property
    def wait_s(self) -> float:
        """Seconds of the last `run` in which this rank waited for other stages: its bubble, and messages."""
        return self.messages.wait_s

    @property
    def compute_s(self) -> float:
        """Seconds of the last `run`, by the clock of the device, for which it waits."""
        return self.device.elapsed(*self.ran)

    def run(self, batch: Batch) -> SlotLosses:
        """Forward and backward of all my slots, which a GPU may still be at on return; their losses on the last stage
        (elsewhere 0)."""
        actions = self.schedule.actions(self.comm.rank, self.comm.size, len(batch.inputs), len(self.chunks))
        begun = self.device.stamp()
        losses = SlotLosses(self._play(actions, batch), len(batch.inputs), self.device)
        self.ran = begun, self.device.stamp()
        return losses

    def evaluate(self, batch: Batch) -> np.ndarray:
        """Losses of my slots in evaluation mode, float64, nats per token, on the last stage (elsewhere 0)."""
        losses, results = np.zeros(len(batch.inputs)), self.predict(batch)
        if results:     # in one copy: a GPU is waited for once
            losses[list(results)] = torch.stack(list(results.values())).tolist()
        return losses

    def predict(self, batch: Batch) -> dict[int, Tensor]:
        """What the last stage makes of my slots in evaluation mode (elsewhere nothing): losses, or without targets
        the model's outputs.

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

    def _play(self, actions: list[Action], batch: Batch) -> dict[int, Tensor]:
        self._begin(micro_batches(batch, self.torch))
        slot = batch.inputs.shape[1:]
        keys = [key for key in map(self._needs, actions) if key is not None]
        shapes = [self.chunks[0].input_shape(routes.cut(key), slot) for key in keys]
        self.messages.expect(zip(keys, shapes, strict=True))
        for chunk, deferred in zip(self.chunks, self.deferred, strict=False):    # none where nothing is deferred
            deferred.prepare(chunk.rows(slot))
        for action in actions:
            self.passes[action.kind](action)
            self.played += 1
        self.messages.finish()
        results = self.results
        self._begin([])     # graphs of an evaluation are dropped here
        return results

    def drop(self) -> None:
        """Forget the step in hand."""
        self._begin([])

    def give_back(self) -> None:
        """The chunks' layers are again what they were."""
        for deferred in self.deferred:
            deferred.undo()

    def _begin(self, batch: list[tuple[Tensor, Tensor | None, Tensor | None]]) -> None:
        self.batch = batch
        self.results: dict[int, Tensor] = {}
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
            self.results[slot] = output.detach()
        if chunk.training:
            self.graphs[action.chunk, slot] = (output / self.num_slots if chunk.last else output), hidden
        self._send(action, output)

    def _backward(self, action: Action) -> None:
        output, hidden = self.graphs.pop((action.chunk, action.micro_batch))
        gradient = self._received(action)
        self.slots.begin_slot(action.micro_batch, self.names[action.chunk])
        torch.autograd.backward(seed(output, gradient))
        self.slots.end_slot()
        self._send(action, None if hidden is None else hidden.grad)

    def _input(self, action: Action) -> None:
        output, hidden = self.graphs.pop((action.chunk, action.micro_batch))
        deferred, gradient = self.deferred[action.chunk], self._received(action)
        self.slots.begin_slot(action.micro_batch, deferred.early, deferred.late)
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
    one = next(model.parameters())
    return Pipeline([model], _Nobody(), MPI.COMM_SELF, schedules.get("1f1b"), num_slots=1, dtype=one.dtype,
                    device=str(one.device))


class _Nobody:
    """Takes no gradients."""

    def begin_slot(self, slot: int, names: Collection[str], later: Collection[str] = ()) -> None: ...

    def end_slot(self) -> None: ...


def micro_batches(batch: Batch, device: str = "cpu") -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """(inputs, targets, documents) of each slot; of GPT [micro_batch_size, sequence_length]."""
    every = [_slots(array, len(batch.inputs), device) for array in batch]
    return list(zip(*every, strict=True))


def _slots(array: np.ndarray | None, count: int, device: str) -> Iterable[Any]:
    """The batch goes to a GPU in one copy, from pinned memory, while the host goes on."""
    if array is None:
        return [None] * count
    values = torch.from_numpy(array)
    return values if device == "cpu" else values.pin_memory().to(device, non_blocking=True)
