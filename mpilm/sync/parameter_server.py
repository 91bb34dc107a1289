"""Parameter servers: the first ranks hold parameters and optimizer state; the others push gradients, pull parameters.

    worker    ... backward | push bucket 0 | push bucket 1 | ...     pull, straight into the weights | next step
    server    receive      | sum bucket 0  | sum bucket 1  | ... norm, update, send

This is the workers' side; `_server.py` is the other one. A bucket's gradients are summed over this worker's slots and
pushed as float32, to every server its segment, while the backward pass still runs. A server of the same node has them
before its eyes, in memory that they share, and is only told that they are there. What comes back is what the model
computes with (bf16, or float32), and a word about the update (`_reply.py`). When it comes is the servers' affair:
`_clocks.py` has the rules, which with staleness 0 make a step of all workers one update, to the bit that of allreduce.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from mpi4py import MPI

from mpilm import bridge
from mpilm.comm import arrays, order, p2p
from mpilm.comm.collectives import Then, nothing_more
from mpilm.comm.devices import Array
from mpilm.comm.roles import Roles
from mpilm.comm.worker import Inline, Worker
from mpilm.flat import Update
from mpilm.sync._buckets import Read, Run
from mpilm.sync._compressed import Compress
from mpilm.sync._gradients import Gradients, Whole
from mpilm.sync._layout import Layout
from mpilm.sync._pushes import Push, server_layouts
from mpilm.sync._reply import SIZE, Reply
from mpilm.sync._slots import Visit, running_visits, tree_visits
from mpilm.sync._synchronizer import Synchronizer, nothing


class Pulled:
    """A worker's bucket: weights that come from servers, gradients that go there.

    On a GPU both have a copy in pinned memory of the host, which is what travels.

    Attributes:
        flat: [count], what the model computes with.
        array: Where weights arrive: the same memory, or the host's.
    """

    gradients: Gradients

    def __init__(self, layout: Layout, roles: Roles, compress: Compress, *, dtype: torch.dtype,
                 visits: Sequence[Visit]) -> None:
        self.layout, self.roles, self.compress = layout, roles, compress
        self.cut = order.segments(layout.count, roles.servers)
        device, bits = roles.device, bridge.array_dtype(dtype)
        host = arrays.zeros if device.shares else device.pinned
        self.array = host(layout.count, bits)
        self.weights = self.array if device.shares else device.zeros(layout.count, bits)
        self.flat = bridge.tensor(self.weights, dtype)
        shared = roles.places(layout.count, wanted=compress.way is None)[roles.side.rank]
        self.outgoing = host(layout.count, np.float32) if shared is None else shared
        self.gradients = Whole(
            layout, lambda count, dtype: self.outgoing if device.shares else device.zeros(count, dtype), self._push,
            slice(0, layout.count), visits)
        self.pushes = [Push(self.outgoing[piece], layout.runs_in(piece), compress.codec,
                            seen=shared is not None and roles.near(server)) for server, piece in enumerate(self.cut)]

    def depart(self, slot: int, *, last: bool) -> Callable[[], None]:
        """As Leaving."""
        return partial(self.gradients.depart(slot), nothing_more)

    def _push(self, gradients: Array, then: Then = nothing_more) -> None:
        """To the servers, who sum: here there is nothing to be told of."""
        if gradients is not self.outgoing:
            self.roles.device.to_host(gradients, self.outgoing)
            self.roles.device.settle()
        ledger = p2p.Ledger()
        for server, push in enumerate(self.pushes):
            for part in push.messages(coded=self.compress.begun):
                ledger.send(self.roles.comm, part, dest=server, tag=p2p.TAG_PUSH)
        ledger.wait()

    def pull(self, ledger: p2p.Ledger) -> None:
        """Begin to receive what servers send."""
        for server, piece in enumerate(self.cut):
            for part in arrays.messages(self.array[piece]):
                ledger.receive(self.roles.comm, part, source=server, tag=p2p.TAG_PULL)

    def pulled(self) -> None:
        """It has arrived; the model's next pass finds it."""
        if self.weights is not self.array:
            self.roles.device.to_device(self.array, self.weights)


class ParameterServer(Synchronizer[Pulled]):
    """A worker: takes over the memory of `parameters`, which servers fill.

    Args:
        parameters, decayed, num_slots, dtype, reproducible: As Allreduce.
        roles: In place of a collective.
        stages: Of one rank: servers do not hold parts of a model that is cut into stages.
        update: Its states are with the servers.
        compress: What gradients are pushed as.
        repeated: None.

    Collective over `roles.comm`, of which some serve.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decayed: set[str], roles: Roles, stages: MPI.Comm,
                 worker: Worker | Inline, *, update: Update, compress: Compress, num_slots: int, dtype: torch.dtype,
                 bucket_mib: float, reproducible: bool, repeated: Collection[str] = ()) -> None:
        assert stages.size == 1, "a pipeline has parameters that this rank does not know"
        assert not repeated, "servers count for the norm whatever they hold"
        visits = (tree_visits if reproducible else running_visits)(num_slots)
        layouts = server_layouts(parameters, decayed, bucket_mib=bucket_mib, servers=roles.servers)
        self.roles, self.reply = roles, Reply()
        buckets = [Pulled(layout, roles, compress, dtype=dtype, visits=visits) for layout in layouts]
        super().__init__(parameters, buckets, worker, num_slots=num_slots)

    def step(self, update: Update, commit: Callable[[], None] = nothing) -> None:
        """Push what is left, pull the next parameters, and know what became of the update."""
        started = time.perf_counter()
        self.worker.wait()
        commit()
        self._pull()
        self.departures = self._all_departures(self.places)
        self.grad_norm = self.reply.grad_norm
        self.reply.tell(update)
        self.seconds = {"comm_s": time.perf_counter() - started, "optim_s": 0.0}

    def _pull(self) -> None:
        ledger, told = p2p.Ledger(), np.empty(SIZE)
        ledger.receive(self.roles.comm, told, source=0, tag=p2p.TAG_PULL)
        for bucket in self.buckets:
            bucket.pull(ledger)
        ledger.wait()
        for bucket in self.buckets:
            bucket.pulled()
        self.reply = Reply.from_array(told)

    def done(self, step: int) -> float:
        """As Synchronizer; others may be ahead or behind."""
        return self.reply.done

    def told(self) -> dict[str, Any]:
        """Staleness of all gradients so far, everyone's."""
        return self.reply.staleness.told()

    def load(self, read: Read) -> None:
        """Pull: servers have read."""
        self._pull()

    def runs(self, part: int, parts: int) -> list[Run]:
        """Nothing: servers have it all."""
        return []

    def memory(self) -> dict[str, int]:
        """As Synchronizer."""
        return {"weights": sum(bucket.array.nbytes for bucket in self.buckets), "masters": 0, "optimizer": 0,
                "gradients": sum(bucket.gradients.nbytes for bucket in self.buckets)}
