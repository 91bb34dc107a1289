"""Runs a schedule of exchanges over a buffer, block by block, two blocks at a time.

A schedule says for one block what a rank sends and receives at every stage; this is all that ring and tree differ in.
Blocks take turns in pairs:

    block 0   stage 0           stage 1           ...
    block 1           stage 0           stage 1   ...

Between nodes one block's addition runs while the other's message is in flight, and blocks are small enough to stay in
the cache between their stages. Within a node the ranks' cores are what moves messages, so nothing runs beside them, and
every message is a chance to wait for each other: there the fewest are the fastest, and a block is all that there is
room for. So is a buffer that fits in the cache anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from mpilm.comm import arrays, p2p
from mpilm.comm.devices import HOST, Array
from mpilm.comm.node import Node
from mpilm.comm.transport import ON_HOST, Transport

WHOLE_BYTES = 4 * 2**20  # a buffer up to this length is one block
SEGMENT_BYTES = 2**20  # a rank's own part of a block; measured: shorter ones are slower
NODE_SEGMENT_BYTES = 128 * 2**20  # the same within a node, and the most that lands beside the buffer, twice


class Stage(NamedTuple):
    """One exchange: send a slice of the block, receive another one and add it (`add`) or put it in place."""

    dest: int
    send: slice
    source: int
    receive: slice
    add: bool


Schedule = Callable[[int, int, int], list[Stage]]  # (length of a block, rank, size) -> its stages


def segment_bytes(node: Node, comm: MPI.Comm, transport: Transport) -> int:
    """A rank's own part of a block among the ranks of `comm`, over which `node` was built."""
    within = node.comm.size == comm.size and transport.device is HOST
    return NODE_SEGMENT_BYTES if within else transport.device.grain * SEGMENT_BYTES


class Pipeline:
    """A schedule with the two receive buffers it needs.

    Args:
        comm: Whose ranks the stages name.
        schedule: The stages of a block of a given length.
        block_bytes: Length of a block.
        tag: Of all messages.
        transport: Of the buffers.
    """

    def __init__(self, comm: MPI.Comm, schedule: Schedule, *, block_bytes: int, tag: int,
                 transport: Transport = ON_HOST) -> None:
        self.comm, self.tag, self.transport, self.block_bytes = comm, tag, transport, block_bytes
        self.whole_bytes = transport.device.grain * WHOLE_BYTES
        self._stages = cache(lambda length: schedule(length, comm.rank, comm.size))
        self._space = [transport.device.empty(0, np.uint8)] * 2

    def run(self, buffer: Array) -> None:
        """Take every block of a 1-D buffer through all its stages. Collective over `comm`."""
        length = max(1, len(buffer)) if buffer.nbytes <= self.whole_bytes else self.block_bytes // buffer.itemsize
        blocks = [buffer[cut] for cut in arrays.chunks(0, len(buffer), length)]
        self.play([(block, self._stages(len(block))) for block in blocks])

    def play(self, blocks: Sequence[tuple[Array, Sequence[Stage]]]) -> None:
        """Take blocks, each an array object of its own, through as many stages each. Collective over `comm`."""
        before: _Exchange | None = None
        for turn, (block, stage) in enumerate(_items(blocks)):
            if before and before.block is block:
                before.finish()
                before = None
            exchange = self._start(block, stage, turn % 2)
            if before:
                before.finish()
            before = exchange
        if before:
            before.finish()

    def _start(self, block: Array, stage: Stage, parity: int) -> _Exchange:
        """Post one stage's messages. What is to be added lands beside the block, the rest in place."""
        mine = block[stage.receive]
        landing = self._landing(mine, parity) if stage.add else mine
        ledger = self.transport.ledger()
        ledger.receive(self.comm, landing, source=stage.source, tag=self.tag)
        ledger.send(self.comm, block[stage.send], dest=stage.dest, tag=self.tag)
        return _Exchange(block, mine, landing, ledger)

    def _landing(self, mine: Array, parity: int) -> Array:
        if len(self._space[parity]) < mine.nbytes:
            self._space[parity] = self.transport.device.zeros(mine.nbytes, np.uint8)
        return self._space[parity][: mine.nbytes].view(mine.dtype)


def _items(blocks: Sequence[tuple[Array, Sequence[Stage]]]) -> Iterator[tuple[Array, Stage]]:
    """All stages of all blocks, those of blocks 0 and 1 in turns, then those of 2 and 3, ..."""
    for first in range(0, len(blocks), 2):
        pair = blocks[first : first + 2]
        for number in range(len(pair[0][1])):
            for block, stages in pair:
                yield block, stages[number]


class _Exchange(NamedTuple):
    """One stage of one block in flight."""

    block: Array
    mine: Array
    landing: Array
    ledger: p2p.Ledger

    def finish(self) -> None:
        self.ledger.wait()
        if self.landing is not self.mine:
            np.add(self.mine, self.landing, out=self.mine)
