"""How a bucket is summed: by a collective, or with fewer bytes in the way that `--sync.compress` names.

    compress = uncompressed, or compressed(way, warmup=100, applied=lambda: update.applied)
    reduce = compress(layout, collective, collective.allreduce)     # of one buffer that is laid out so
    reduce(buffer)

For the first `warmup` updates, while gradients change direction quickly, it is the collective. Residuals belong to a
buffer and stay with the rank: a checkpoint does not hold them, and a resumed run begins without.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpilm.comm.collectives import Collective
from mpilm.sync._gradients import Reduce
from mpilm.sync._layout import Layout
from mpilm.sync.compress import Way

# (how its elements lie, over whose ranks, how it is summed else) -> how a buffer is summed. Collective.
Compress = Callable[[Layout, Collective, Reduce], Reduce]


def uncompressed(layout: Layout, collective: Collective, plain: Reduce) -> Reduce:
    """By the collective."""
    return plain


def compressed(way: Way, *, warmup: int, applied: Callable[[], int]) -> Compress:
    """By `way`, once `applied()` updates have been made; every rank then has all of the sum, the same bits."""
    def compress(layout: Layout, collective: Collective, plain: Reduce) -> Reduce:
        fewer = way.over(collective, layout)

        def reduce(buffer: np.ndarray) -> None:
            (plain if applied() < warmup else fewer)(buffer)
        return reduce
    return compress
