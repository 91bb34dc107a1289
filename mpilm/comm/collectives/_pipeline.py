"""Runs a schedule of exchanges over a buffer, block by block, two blocks at a time.

A schedule says for one block what a rank sends and receives at every stage; this is all that ring and tree differ in.
Blocks are small enough to stay in the cache between their stages, and they take turns in pairs:

    block 0   stage 0           stage 1           ...
    block 1           stage 0           stage 1   ...

One block's addition runs while the other's message is in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from mpilm.comm import arrays, p2p


class Stage(NamedTuple):
    """One exchange: send a slice of the block, receive another one and add it (`add`) or put it in place."""

    dest: int
    send: slice
    source: int
    receive: slice
    add: bool


Schedule = Callable[[int], list[Stage]]  # length of a block -> its stages


class Pipeline:
    """A schedule with the two receive buffers it needs.

    Args:
        comm: Whose ranks the stages name.
        schedule: The stages of a block of a given length.
        block_bytes: Length of a block, and so a bound on every message.
        tag: Of all messages.
    """

    def __init__(self, comm: MPI.Comm, schedule: Schedule, *, block_bytes: int, tag: int) -> None:
        self.comm = comm
        self.schedule = schedule
        self.block_bytes = block_bytes
        self.tag = tag
        self._space: list[np.ndarray] = []

    def run(self, buffer: np.ndarray) -> None:
        """Take every block of a 1-D buffer through all its stages. Collective over `comm`."""
        pending: _Exchange | None = None
        for turn, (block, stage) in enumerate(self._items(buffer)):
            if pending and pending.block is block:
                pending.finish()
                pending = None
            exchange = _Exchange(block, stage, self._receive_buffer(block, stage, turn % 2))
            exchange.start(self.comm, self.tag)
            if pending:
                pending.finish()
            pending = exchange
        if pending:
            pending.finish()

    def _items(self, buffer: np.ndarray) -> Iterator[tuple[np.ndarray, Stage]]:
        """All stages of all blocks, those of blocks 0 and 1 in turns, then those of 2 and 3, ..."""
        length = self._block_length(buffer)
        blocks = [buffer[cut] for cut in arrays.chunks(0, len(buffer), length)]
        for first in range(0, len(blocks), 2):
            pair = [(block, self.schedule(len(block))) for block in blocks[first : first + 2]]
            for number in range(len(pair[0][1])):
                yield from ((block, stages[number]) for block, stages in pair)

    def _block_length(self, buffer: np.ndarray) -> int:
        """Elements of a block: so many that the blocks are at most block_bytes and there are an even number of them."""
        pairs = -(-buffer.nbytes // (2 * self.block_bytes))
        return max(1, -(-len(buffer) // (2 * max(1, pairs))), arrays.LEAST_MESSAGE)

    def _receive_buffer(self, block: np.ndarray, stage: Stage, parity: int) -> np.ndarray:
        """Where the message lands: in the block itself, or beside it if it is to be added."""
        if not stage.add:
            return block[stage.receive]
        length = stage.receive.stop - stage.receive.start
        if not self._space or len(self._space[0]) < length * block.itemsize:
            self._space = [arrays.zeros(length * block.itemsize, np.uint8) for _ in range(2)]
        return self._space[parity][: length * block.itemsize].view(block.dtype)


class _Exchange:
    """One stage of one block in flight."""

    def __init__(self, block: np.ndarray, stage: Stage, landing: np.ndarray) -> None:
        self.block, self.stage, self.landing = block, stage, landing
        self.ledger = p2p.Ledger()

    def start(self, comm: MPI.Comm, tag: int) -> None:
        self.ledger.receive(comm, self.landing, source=self.stage.source, tag=tag)
        self.ledger.send(comm, self.block[self.stage.send], dest=self.stage.dest, tag=tag)

    def finish(self) -> None:
        self.ledger.wait()
        if self.stage.add:
            mine = self.block[self.stage.receive]
            np.add(mine, self.landing, out=mine)
