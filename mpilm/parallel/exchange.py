"""How ranks that share layers exchange activations: through memory of their node, or by any collective of the menu.

    exchange = build("auto", comm, rows=batch * tokens, width=width, dtype=torch.bfloat16)
    whole = exchange.gather(x, dim=1)       everyone's x, one after the other
    mine = exchange.scatter(x, dim=1)       my part of the sum of everyone's x

Sums are made in float32 (float64 where that is what is computed with) and rounded once. All are collective, block, and
return tensors of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpilm import bridge
from mpilm.comm import arrays, choose, order, p2p
from mpilm.comm.collectives import Collective
from mpilm.comm.devices import Array
from mpilm.comm.node import Node
from mpilm.comm.transport import ON_HOST, Transport
from mpilm.model.online import exact_dtype

TURNS = 2
FLOAT_BYTES = 4


class Exchange(Protocol):
    """Between the ranks of a communicator."""

    rank: int
    size: int

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Everyone's `x`, of one shape and dtype, along `dim` in the order of ranks."""

    def scatter(self, x: Tensor, dim: int) -> Tensor:
        """My part along `dim`, of `size` equal ones, of the sum of everyone's `x`, in the dtype of `x`."""

    def free(self) -> None:
        """Give communicators back. Collective."""


def build(name: str, comm: MPI.Comm, *, rows: int, width: int, dtype: torch.dtype, reproducible: bool = False,
          transport: Transport = ON_HOST, never: Collection[str] = ()) -> Exchange:
    """An exchange by the collective of that name. Collective over `comm`.

    Args:
        name: "auto" and "shared" go through memory, if the ranks are on one node and compute on it; else as in
            choose.build.
        rows: Tokens of a micro-batch at most, over all ranks.
        width: Elements of a token's activations, which are of `dtype`.
        transport: Of the device that computes.
        never: What "auto" must not pick.

    Raises:
        UserError: It cannot work here. SharedMemoryError is one.
    """
    node, sum_bytes = Node.build(comm), torch.promote_types(dtype, torch.float32).itemsize
    nbytes = max(rows * max(width * dtype.itemsize, 2 * sum_bytes), width * sum_bytes)
    shared_bytes = TURNS * comm.size * nbytes
    by_memory = transport.device.shares and node.num_nodes == 1 and name in ("auto", "shared")
    if by_memory and node.room() > shared_bytes:
        return Memory(node, nbytes)
    return Messages(choose.build(name, comm, node, count=nbytes // FLOAT_BYTES, reproducible=reproducible,
                                 shared_bytes=shared_bytes, transport=transport, never=never), node)


class Memory:
    """Through memory that the ranks of a node share.

        gather      write x into its place                  meet     copy the whole
        scatter     write the others' parts of x for them   meet     add what they wrote for me to my own part

    Two halves of the memory are used in turns: who has met the others in one half knows that all have left the other.
    So one meeting is enough. Each says what it is there for: ranks that are not in the same place would read nonsense.
    """

    def __init__(self, node: Node, nbytes: int) -> None:
        self.node, self.rank, self.size = node, node.comm.rank, node.comm.size
        self.room = -(-nbytes // arrays.ALIGNMENT) * arrays.ALIGNMENT
        memory = torch.from_numpy(node.allocate_common(TURNS * self.size * self.room, np.uint8))
        self.halves = memory.view(TURNS, self.size * self.room)
        self.purposes = node.allocate_common(TURNS * self.size, np.int64).reshape(TURNS, self.size)
        self.turn = 0

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """As Exchange."""
        shape = [size * self.size if number == dim else size for number, size in enumerate(x.shape)]
        whole = self._half(x.nbytes * self.size).view(x.dtype).view(shape)
        whole.chunk(self.size, dim)[self.rank].copy_(x)
        self._meet(x.nbytes)
        return whole.clone()

    def scatter(self, x: Tensor, dim: int) -> Tensor:
        """As Exchange, along the tree over ranks."""
        given = x.chunk(self.size, dim)
        # [whose part, of whose x, ...]; my part of my own x stays where it is
        parts = self._half(x.nbytes * self.size).view(x.dtype).view(self.size, self.size, *given[0].shape)
        for owner, part in enumerate(given):
            if owner != self.rank:
                parts[owner, self.rank].copy_(part)
        self._meet(-x.nbytes)
        summands = list(parts[self.rank])
        summands[self.rank] = given[self.rank]
        return total(summands)

    def _half(self, nbytes: int) -> Tensor:
        """The first bytes of the half that it is the turn of."""
        self.turn = (self.turn + 1) % TURNS
        assert nbytes <= self.size * self.room, f"{nbytes // self.size} bytes through memory for {self.room}"
        return self.halves[self.turn, :nbytes]

    def _meet(self, purpose: int) -> None:
        purposes = self.purposes[self.turn]
        purposes[self.rank] = purpose
        p2p.barrier(self.node.comm)
        assert (purposes == purpose).all(), f"the ranks exchange different things: {purposes.tolist()} bytes"

    def free(self) -> None:
        """As Exchange."""
        self.node.free()


class Messages:
    """By a collective, in float32 where sums are made; parts lie so that the collective's segments are ranks' shares.
    """

    def __init__(self, collective: Collective, node: Node) -> None:
        self.collective, self.node = collective, node
        self.rank, self.size = collective.comm.rank, collective.comm.size
        self.buffers: dict[tuple[int, torch.dtype], Array] = {}

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """As Exchange."""
        buffer, parts = self._parts(x.shape, x.dtype)
        parts[self.rank].copy_(x)
        self.collective.allgather(buffer)
        return torch.cat(parts, dim)

    def scatter(self, x: Tensor, dim: int) -> Tensor:
        """As Exchange, in the order of the collective."""
        given = x.chunk(self.size, dim)
        buffer, parts = self._parts(given[0].shape, exact_dtype(x))
        for part, mine in zip(parts, given, strict=True):
            part.copy_(mine)
        self.collective.reduce_scatter(buffer)
        return parts[self.rank].to(x.dtype, copy=True)

    def _parts(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Array, list[Tensor]]:
        """A buffer, and in it a place of `shape` in every rank's segment."""
        count = torch.Size(shape).numel()
        length = count if count < order.BLOCK else -(-count // order.BLOCK) * order.BLOCK
        key = length, dtype
        if key not in self.buffers:
            self.buffers[key] = self.collective.allocate(length * self.size, bridge.array_dtype(dtype))
        buffer = self.buffers[key]
        return buffer, [part[:count].view(shape) for part in bridge.tensor(buffer, dtype).view(self.size, length)]

    def free(self) -> None:
        """As Exchange."""
        self.collective.free()
        self.node.free()


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum along the tree over `parts`, rounded once: what a collective of fixed order makes of them too."""
    if len(parts) == 2:     # rounded once in any dtype, and in one go
        return parts[0] + parts[1]
    values = [part.to(exact_dtype(part), copy=True) for part in parts]
    for into, other in order.tree(len(parts)):
        values[into].add_(values[other])
    return values[0].to(parts[0].dtype)
