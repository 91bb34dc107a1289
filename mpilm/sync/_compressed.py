"""An entry of the collectives menu that sends fewer bytes: what a synchronizer sums with when gradients are compressed.

For the first `warmup` updates, while gradients change direction quickly, it is the collective it stands in for. After
that each buffer is summed by an `Exchange`, with residuals of its own. Residuals stay with the rank: a checkpoint does
not hold them, and a resumed run begins without.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpilm.comm.collectives import Collective
from mpilm.sync._exchange import Exchange
from mpilm.sync.compress import Codec


class Compressed(Collective):
    """Sums over the ranks of `collective`, every rank with a copy of the sum. Collective over them, like its methods.

    Args:
        collective: Sums uncompressed, during warm-up.
        applied: Says how many updates have been made so far.
    """

    def __init__(self, codec: Codec, collective: Collective, *, warmup: int, applied: Callable[[], int]) -> None:
        super().__init__(collective.comm, collective.node)
        self.codec, self.collective, self.warmup, self.applied = codec, collective, warmup, applied
        self.exchanges: dict[int, Exchange] = {}

    def allreduce(self, buffer: np.ndarray) -> None:
        """As the base class says, but for what the code leaves out; `buffer` is one that `allocate` gave."""
        if self.applied() < self.warmup:
            self.collective.allreduce(buffer)
            return
        place = buffer.ctypes.data
        if place not in self.exchanges:
            self.exchanges[place] = Exchange(self.codec, self.comm, buffer.size)
        self.exchanges[place].reduce(buffer)

    def reduce_scatter(self, buffer: np.ndarray) -> None:
        """As allreduce: residuals are those of whole buffers."""
        self.allreduce(buffer)

    def free(self) -> None:
        """Give the communicators back. Collective over `comm`."""
        self.collective.free()
        super().free()
