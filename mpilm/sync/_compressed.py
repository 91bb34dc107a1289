"""How gradients are sent: as float32, or with fewer bytes in the way that `--sync.compress` names.

    compress = compressed(config.sync, update)
    compress = Compress()                                   # as float32
    compress = Compress(way, warmup=100, applied=lambda: update.applied)
    reduce = compress(layout, collective, collective.reduce)     # sums one buffer that is laid out so
    reduce(buffer)

For the first `warmup` updates, while gradients change direction quickly, they are float32. Residuals belong to a
buffer and stay with the rank: a checkpoint does not hold them, and a resumed run begins without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mpilm import menu
from mpilm.comm.collectives import Collective, Then, nothing_more
from mpilm.comm.devices import Array
from mpilm.config import Sync
from mpilm.flat import Update
from mpilm.sync import compress as ways
from mpilm.sync._gradients import Reduce, afterwards
from mpilm.sync._layout import Layout
from mpilm.sync.compress import Codec, Way


@dataclass(frozen=True)
class Compress:
    """A way, and from when on. `applied()` says how many updates have been made."""

    way: Way | None = None
    warmup: int = 0
    applied: Callable[[], int] = lambda: 0

    def __call__(self, layout: Layout, collective: Collective, plain: Reduce) -> Reduce:
        """How a buffer is summed over the ranks of `collective`; `plain` is how it is where nothing is compressed.

        By the way, every rank has all of the sum, the same bits. Collective, like what it returns.
        """
        if self.way is None:
            return plain
        compressed = afterwards(self.way.over(collective, layout))

        def reduce(buffer: Array, then: Then = nothing_more) -> None:
            (compressed if self.begun else plain)(buffer, then)
        return reduce

    @property
    def begun(self) -> bool:
        """Whether what is sent now is compressed."""
        return self.way is not None and self.applied() >= self.warmup

    @property
    def codec(self) -> Codec | None:
        """For whoever sums by himself what others send one at a time, which only a codec can do."""
        assert self.way is None or isinstance(self.way, Codec), "options refuse others"
        return self.way


def compressed(config: Sync, update: Update) -> Compress:
    """As configured; `update` counts.

    Raises:
        UserError: There is no such way.
    """
    way = ways.get(config.compress)
    if config.compress == "none":
        return Compress()
    return Compress(way(**menu.options(way, config)), config.compress_warmup, lambda: update.applied)
