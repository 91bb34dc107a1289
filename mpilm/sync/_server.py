"""A server: receives gradients, updates its share of the parameters, sends them to whoever may go on.

    server 0    which worker's gradients come next: the first that are all there
    every server    wait for them | sum, norm over all servers | update | send

All servers apply the same gradients in the same order, so the parts of a pull are all of one version, and a server
does one thing at a time, so none of them is half an update. The order is a log that server 0 writes, one entry an
update, and tells the others; with staleness 0 there is nothing to choose. Whom an update sets free follows from the log
alone (`_clocks.py`). A worker has one push under way at most, and a place for it is ready before the worker is sent the
parameters that it will compute with; so memory is bounded, and no message comes unexpected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from mpi4py import MPI

from mpilm.comm import p2p
from mpilm.comm.roles import Roles
from mpilm.flat import Update
from mpilm.sync import _staleness
from mpilm.sync._buckets import Read, Run
from mpilm.sync._clocks import Clocks
from mpilm.sync._compressed import Compress
from mpilm.sync._held import Held
from mpilm.sync._pushes import server_layouts
from mpilm.sync._reply import Reply
from mpilm.sync._staleness import Staleness


class Server:
    """This server's share of parameters and optimizer state.

    Args:
        parameters: Name -> parameter, in the order of the forward pass; only their sizes are looked at.
        decayed: Names of the parameters that weight decay applies to.
        rule: An entry of _staleness.MENU.
        compress: What gradients come as.
        states: Names of the update's states, one float32 array each.
        dtype: What the model computes with.
        compiled: The update is.

    Collective over `roles.side`, like every method.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decayed: set[str], roles: Roles, clocks: Clocks, *,
                 rule: str, compress: Compress, states: Sequence[str], dtype: torch.dtype, bucket_mib: float,
                 compiled: bool = False) -> None:
        self.roles, self.clocks, self.rule = roles, clocks, _staleness.get("none" if clocks.together else rule)
        self.buckets = [Held(layout, roles, self.rule, compress, states=states, dtype=dtype, compiled=compiled)
                        for layout in server_layouts(parameters, decayed, bucket_mib=bucket_mib, servers=roles.servers)]
        blocks = sum(bucket.squares.size for bucket in self.buckets)
        self.counts: list[int] = roles.side.allgather(blocks)
        self.staleness = Staleness()
        self.grad_norm = math.nan
        self._replies = p2p.Ledger()
        self._turn = 0

    def load(self, read: Read, update: Update) -> None:
        """Set parameters and optimizer state from `read(state, parameter, first, count)`, and let everyone begin."""
        for bucket in self.buckets:
            bucket.load(read)
        self._send(update, self.clocks.release())

    def serve(self, update: Update) -> None:
        """One update, of the gradients that come next; a NaN or infinite norm leaves everything as it was."""
        members = self._next()
        lag = self.clocks.lag(members)
        for bucket in self.buckets:
            bucket.collect(members, stale=lag > 0)
        self.grad_norm = math.sqrt(math.fsum(self._all_blocks()))
        update.begin(self.clocks.done[members[0]])
        update.lr *= self.rule.rate(lag)
        for _ in members:
            self.staleness.note(lag)
        scale = update.accept(self.grad_norm)
        self._send(update, self.clocks.advance(members), scale)

    def _next(self) -> list[int]:
        """Whose gradients are applied now."""
        if self.clocks.together:
            return list(range(self.roles.workers))
        choice = np.array([p2p.until(self._arrived) if self.roles.side.rank == 0 else 0], np.int64)
        p2p.wait([self.roles.side.Ibcast(choice)])
        self._turn = int(choice[0]) + 1
        return [int(choice[0])]

    def _arrived(self) -> int | None:
        """A worker whose gradients are all here; they take turns, so nobody is passed over for ever."""
        for number in range(self._turn, self._turn + self.roles.workers):
            worker = number % self.roles.workers
            if worker in self.clocks.computing and MPI.Request.Testall(
                    [request for bucket in self.buckets for request in bucket.requests[worker]]):
                return worker
        return None

    def _all_blocks(self) -> np.ndarray:
        """The sums of squares of all blocks of all servers."""
        mine, everyone = np.concatenate([bucket.squares for bucket in self.buckets]), np.empty(sum(self.counts))
        p2p.wait([self.roles.side.Iallgatherv(mine, (everyone, self.counts))])
        return everyone

    def _send(self, update: Update, workers: Sequence[int], scale: float | None = None) -> None:
        """Update, bucket by bucket, and send each as soon as it is new to the `workers` that may go on."""
        for worker in self.clocks.computing.intersection(workers):
            for bucket in self.buckets:
                bucket.expect(worker)
        self._replies.reap()
        for worker in workers if self.roles.side.rank == 0 else ():
            self._replies.send(self.roles.comm, self._reply(update).to_array(), dest=self.roles.rank(worker),
                               tag=p2p.TAG_PULL)
        for bucket in self.buckets:
            bucket.update(update, scale)
            bucket.send(workers)

    def _reply(self, update: Update) -> Reply:
        return Reply(self.clocks.version, self.clocks.mean, self.grad_norm, update.lr, update.applied, update.skipped,
                     update.skipped_in_a_row, self.staleness)

    def finish(self) -> None:
        """Return when everything that was sent has arrived. Gradients that nobody will send are not waited for: this is
        the end."""
        for worker in self.clocks.computing:
            for bucket in self.buckets:
                bucket.give_up(worker)
        self.drain()

    def drain(self) -> None:
        """Return when everything that was sent has arrived; what workers will send next can still come."""
        for bucket in self.buckets:
            bucket.sends.wait()
        self._replies.wait()

    def runs(self, part: int, parts: int) -> list[Run]:
        """Share number `part` of everything a resume needs: that of the server of this number."""
        assert (part, parts) == (self.roles.side.rank, self.roles.servers), f"share {part} of {parts} is another's"
        return [run for bucket in self.buckets for run in bucket.own_runs()]

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds: "weights" (to send, and what workers pulled where a rule asks for that),
        "masters", "optimizer", "gradients"."""
        held = [bucket.nbytes for bucket in self.buckets]
        return {kind: sum(nbytes[kind] for nbytes in held) for kind in held[0]}
