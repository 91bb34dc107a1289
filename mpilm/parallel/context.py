"""Context parallelism: the ranks of a ring share every sequence, so that it can be longer than one of them holds.

    ring = Ring(mesh.cp)
    part = GPT(shape, units, ring)          computes with T / size tokens of T, in zig-zag order (zigzag.py)

Only attention looks at other tokens. A rank keeps its queries, and blocks of keys and values travel around the ring,
each to the right, one rank a round: while a rank works on a block, it sends it on and receives the next. What a query
has seen so far is kept as an online softmax (model/online.py), so the result is that of the whole sequence, and no rank
ever holds more than its own block, the one in hand and the one that is coming (ring attention, arXiv 2310.01889).

    round    rank 0   rank 1   rank 2       whose keys; of a ring of 3
      0        0        1        2
      1        2        0        1
      2        1        2        0

In the backward pass the blocks go round once more. The gradients of a block go with it, a round behind: each rank adds
its part, in float32, and the last hop brings them home, where the owner adds its own part. So each sum has a fixed
order, and the bits of a run are the same every time.

Messages are posted before the work that hides them, and looked after between tiles: some MPIs move data only in calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from mpilm.comm import p2p
from mpilm.comm.transport import ON_HOST, Transport
from mpilm.model import online
from mpilm.model.context import Whole
from mpilm.parallel import zigzag
from mpilm.parallel.messages import pieces
from mpilm.parallel.tiles import Tiles


class Ring(Whole):
    """The ranks of `comm`, which share every sequence. `attend` is collective over them, and so is its backward pass.

    A sequence must be cut into 2 x size chunks of equal length.

    Args:
        transport: Of the device that computes.

    Attributes:
        keys: Messages with blocks of keys and values.
        sums: Messages with their gradients.
    """

    def __init__(self, comm: MPI.Comm, transport: Transport = ON_HOST) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.ledgers = self.keys, self.sums = transport.ledger(), transport.ledger()

    def share(self, x: Tensor) -> Tensor:
        """My tokens of [B, T], an early and a late chunk: [B, T / size]."""
        return self._share(x, self.rank)

    def _share(self, x: Tensor, rank: int) -> Tensor:
        assert x.shape[1] % (2 * self.size) == 0, f"{x.shape[1]} tokens over {self.size} ranks"
        chunks = x.chunk(2 * self.size, dim=1)
        return torch.cat([chunks[number] for number in zigzag.chunks(rank, self.size)], dim=1)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """As Whole; in the order of my tokens."""
        return self.share(torch.arange(length, device=device)[None])[0]

    def masks(self, length: int, documents: Tensor | None, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """The documents of every rank's tokens, [size, B, T / size]: each rank knows them all, so they do not travel.
        """
        if documents is None:
            return []
        return [torch.stack([self._share(documents, rank) for rank in range(self.size)])]

    def compiled(self) -> None:
        """Compiled code ends before `attend` and goes on after it."""
        # Not a decorator: that would load the compiler, a second's worth, into every program.
        self.attend = torch.compiler.disable(self.attend)  # type: ignore[method-assign]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor]) -> Tensor:
        """As Whole."""
        tiles = Tiles(self.rank, q, kv_heads=k.shape[2], documents=masks[0] if masks else None)
        y: Tensor = _Attend.apply(q, k, v, self, tiles)
        return y

    def blocks(self, mine: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(owner, block) of every rank, mine first; while one is worked on, it goes on and the next one comes."""
        here = mine
        for turn in range(self.size - 1):
            coming = self.pass_on(here, self.keys, tag=p2p.TAG_KEYS)
            yield (self.rank - turn) % self.size, here
            self.keys.wait()
            here = coming
        yield (self.rank + 1) % self.size, here

    def pass_on(self, block: Tensor, ledger: p2p.Ledger, *, tag: int) -> Tensor:
        """Start to send `block` to the right; what comes from the left is there after ledger.wait()."""
        coming = torch.empty_like(block)
        for piece in pieces(coming):
            ledger.receive(self.comm, piece, source=(self.rank - 1) % self.size, tag=tag)
        for piece in pieces(block):
            ledger.send(self.comm, piece, dest=(self.rank + 1) % self.size, tag=tag)
        return coming

    def look_after_messages(self) -> None:
        """Let MPI move what is under way."""
        for ledger in self.ledgers:
            ledger.reap()


class _Attend(torch.autograd.Function):
    """Queries [B, T, H, D], keys and values [B, T, K, D] of my tokens -> weighted values [B, T, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring, tiles: Tiles) -> Tensor:
        block = torch.stack([x.permute(2, 0, 1, 3).flatten(0, 1) for x in (k, v)])      # 2 N T D
        rows = [online.Rows(q) for q in tiles.split(q)]
        for owner, (keys, values) in ring.blocks(block):
            for row, place, hidden in tiles.visible(owner):
                rows[row].see(keys[:, place], values[:, place], hidden)
                ring.look_after_messages()
        parts, lse = zip(*(row.result() for row in rows), strict=True)
        y = tiles.join(list(parts))
        ctx.ring, ctx.tiles = ring, tiles
        ctx.save_for_backward(block, y, *(row.q for row in rows), *lse)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy, = gradients
        ring, tiles = ctx.ring, ctx.tiles
        block, y, *saved = ctx.saved_tensors
        exact = online.exact_dtype(y)
        delta = (dy.to(exact) * y.to(exact)).sum(-1, keepdim=True)
        parts = _Gradients(ring, tiles, saved, tiles.split(dy), tiles.split(delta))
        sums = parts.around(block).to(block.dtype)
        dk, dv = sums.unflatten(1, (tiles.kv_heads, -1)).permute(0, 2, 3, 1, 4)         # 2 K B T D -> 2 B T K D
        return tiles.join(parts.dq).to(y.dtype), dk, dv, None, None


class _Gradients:
    """The backward pass around the ring; `dq` are the gradients of the tiles of queries, complete after `around`."""

    def __init__(self, ring: Ring, tiles: Tiles, saved: list[Tensor], dy: list[Tensor], delta: list[Tensor]) -> None:
        self.ring, self.tiles, self.dy, self.delta = ring, tiles, dy, delta
        self.q, self.lse = saved[:len(dy)], saved[len(dy):]
        self.dq = [torch.zeros_like(q, dtype=online.exact_dtype(q)) for q in self.q]

    def around(self, mine: Tensor) -> Tensor:
        """The gradients of my block of keys and values."""
        ring = self.ring
        blocks = ring.blocks(mine)
        next(blocks)        # mine is on its way, and comes last here, while its gradients are on the way home
        coming = mine.new_zeros((), dtype=online.exact_dtype(mine))
        for owner, block in blocks:
            sums = self._of(owner, block)
            ring.sums.wait()
            coming = ring.pass_on(sums.add_(coming), ring.sums, tag=p2p.TAG_SUMS)
        sums = self._of(ring.rank, mine)
        ring.sums.wait()
        return sums.add_(coming)

    def _of(self, owner: int, block: Tensor) -> Tensor:
        """My part of the gradients of a block; on the way, its part of those of my queries."""
        keys, values = block
        sums = torch.zeros_like(block, dtype=online.exact_dtype(block))
        for row, place, hidden in self.tiles.visible(owner):
            dq, dk, dv = online.gradients(self.q[row], keys[:, place], values[:, place], self.dy[row], self.lse[row],
                                          self.delta[row], hidden)
            self.dq[row].add_(dq)
            sums[0, :, place].add_(dk)
            sums[1, :, place].add_(dv)
            self.ring.look_after_messages()
        return sums
