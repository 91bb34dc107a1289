"""What stages tell each other: activations forward, their gradients backward.

    messages.expect([(key, shape), ...])   every message of a step, in the order in which it will be needed
    hidden = messages.receive(key)         waits for the next of them
    messages.send(key, tensor)             returns at once; the tensor is kept until it has arrived
    messages.finish()                      everything sent has arrived

A few receives are posted ahead, so that a message can travel while this rank computes. Sends never block before the
end of a step; so two stages that send to each other at the same moment do not wait for each other, whether MPI buffers
messages or not. Between two stages messages of one direction come in order, so a tag for each is enough.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from mpi4py import MPI

from mpilm import bridge
from mpilm.comm import arrays, p2p
from mpilm.comm.devices import Array
from mpilm.comm.transport import ON_HOST, Transport
from mpilm.parallel.routes import Message
from mpilm.parallel.schedules import Kind

AHEAD = 2  # receives posted beside the one that is needed next: one for each direction


class Messages:
    """The messages of this rank, over the pipeline's communicator.

    Args:
        dtype: Of activations: what the model computes with.
        transport: Of the device that it computes on.

    Attributes:
        wait_s: Seconds spent waiting for others, since it was last set to 0.
    """

    def __init__(self, comm: MPI.Comm, dtype: torch.dtype, transport: Transport = ON_HOST) -> None:
        self.comm, self.dtype, self.device = comm, dtype, transport.device.torch
        self.ledger = transport.ledger()
        self.wait_s = 0.0
        self._coming: deque[tuple[Message, tuple[int, ...]]] = deque()
        self._posted: deque[tuple[Message, list[Any], torch.Tensor]] = deque()

    def expect(self, messages: Iterable[tuple[Message, tuple[int, ...]]]) -> None:
        """Get ready to receive these, in this order, each with the shape of its tensor."""
        assert not self._posted, "the messages of the step before were not all received"
        self._coming = deque(messages)
        self._post()

    def _post(self) -> None:
        while self._coming and len(self._posted) <= AHEAD:
            key, shape = self._coming.popleft()
            kind, stage, _ = key
            sender = stage - 1 if kind is Kind.FORWARD else stage + 1
            tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
            requests = [self.ledger.receive(self.comm, piece, source=sender % self.comm.size, tag=_tag(kind, stage))
                        for piece in pieces(tensor)]
            self._posted.append((key, requests, tensor))

    def receive(self, key: Message) -> torch.Tensor:
        """The message `key`, which must be the next of those expected. Waits for it."""
        expected, requests, tensor = self._posted.popleft()
        assert expected == key, f"{key} was wanted before {expected}"
        started = time.perf_counter()
        self.ledger.wait_for(requests)
        self.wait_s += time.perf_counter() - started
        self.ledger.reap()
        self._post()
        return tensor

    def send(self, key: Message, tensor: torch.Tensor) -> None:
        """Start to send `tensor`; it must not change afterwards."""
        kind, stage, _ = key
        self.ledger.reap()
        for piece in pieces(tensor.detach().contiguous()):
            self.ledger.send(self.comm, piece, dest=stage % self.comm.size, tag=_tag(kind, stage))

    def finish(self) -> None:
        """Return when everything sent has been received."""
        started = time.perf_counter()
        self.ledger.wait()
        self.wait_s += time.perf_counter() - started


def pieces(tensor: torch.Tensor) -> list[Array]:
    """A tensor's memory in messages of at most MESSAGE_BYTES; both ends cut it alike, and pieces come in order."""
    flat = bridge.array(tensor.view(-1))
    return [flat[cut] for cut in arrays.chunks(0, len(flat), arrays.MESSAGE_BYTES // flat.itemsize)]


def _tag(kind: Kind, stage: int) -> int:
    """Of the messages to `stage` in one direction."""
    return p2p.TAG_STAGES + 2 * stage + (kind is Kind.BACKWARD)
