"""What every way to send fewer bytes offers, and codecs, which are most of them: float32 values to bytes and back,
chunk by chunk, with or without error feedback.

Values are worked on in chunks that stay in the cache from the first pass over them to the last, and a chunk is encoded
by itself, so the bytes of a long array are those of its chunks one after the other. Every codec has a fixed size for a
number of values: whoever receives knows how much is coming.

Error feedback (arXiv 1809.07599, 1901.09847): what a code leaves out is kept and added to the next values, so that
everything arrives in the end, and compressed SGD converges like SGD.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from mpilm import bridge
from mpilm.comm.collectives import Collective
from mpilm.comm.devices import Array
from mpilm.sync._layout import Layout
from mpilm.sync.compress._exchange import Exchange
from mpilm.sync.compress._packed import Packed

CHUNK = 1 << 16     # values: 256 KiB, half of a second-level cache; and a position in it fits two bytes


class Way(ABC):
    """A way to sum with fewer bytes.

    Attributes:
        OPTIONS: What of the section `sync` of the configuration the constructor takes.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def over(self, collective: Collective, layout: Layout) -> Callable[[Array], None]:
        """Sums a float32 buffer that is laid out so in place, with residuals of its own, over `collective.comm`.

        All ranks end with the same bits. What is not finite on any rank makes the sum so, and leaves no residual.
        Collective over `collective.comm`, like what it returns.
        """


class Codec(Way):
    """Float32 values <-> bytes. A value that is NaN or infinite makes at least one decoded value so.

    Attributes:
        PIECE: Values that are sent at a time, some chunks.
    """

    PIECE: ClassVar[int] = 2 * CHUNK

    def over(self, collective: Collective, layout: Layout) -> Callable[[Array], None]:
        """As Way: encoded segments go to their owners, and encoded sums to everyone."""
        packed = Packed(layout.runs_in(slice(0, layout.count)), device=collective.device.torch)
        exchange = Exchange(self, collective.comm, packed.count, collective.device)

        def reduce(buffer: Array) -> None:
            flat = bridge.tensor(buffer, torch.float32)
            exchange.reduce(bridge.array(packed.gather(flat)))
            packed.spread(flat)
        return reduce

    @abstractmethod
    def chunk_size(self, count: int) -> int:
        """Bytes of a chunk of `count` values, at most CHUNK."""

    @abstractmethod
    def encode_chunk(self, values: Tensor, data: Tensor) -> None:
        """Encode float32 `values` into uint8 `data` of `chunk_size(values.numel())` bytes."""

    @abstractmethod
    def decode_chunk(self, data: Tensor, values: Tensor) -> None:
        """The inverse: fill float32 `values` from `data`."""

    def size(self, count: int) -> int:
        """Bytes that `count` values take."""
        whole, rest = divmod(count, CHUNK)
        return whole * self.chunk_size(CHUNK) + (self.chunk_size(rest) if rest else 0)

    def encode(self, values: Tensor, data: Array) -> None:
        """Encode 1-D float32 `values` into `data`, `size(values.numel())` bytes."""
        for part, code in self._chunks(values, data):
            self.encode_chunk(part, code)

    def decode(self, data: Array, values: Tensor) -> None:
        """Fill 1-D float32 `values` from `data`."""
        for part, code in self._chunks(values, data):
            self.decode_chunk(code, part)

    def squeeze(self, values: Tensor, residual: Tensor, data: Array) -> None:
        """Encode `values` + `residual`; afterwards `values` is what the other side decodes and `residual` the rest."""
        for (part, code), (rest, _) in zip(self._chunks(values, data), self._chunks(residual, data), strict=True):
            rest.add_(part)
            self.encode_chunk(rest, code)
            self.decode_chunk(code, part)
            rest.sub_(part)

    def _chunks(self, values: Tensor, data: Array) -> Iterator[tuple[Tensor, Tensor]]:
        assert data.size == self.size(values.numel()), f"{data.size} bytes for {values.numel()} values"
        codes, start = bridge.tensor(data, torch.uint8), 0
        for part in values.split(CHUNK) if values.numel() else ():
            stop = start + self.chunk_size(part.numel())
            yield part, codes[start:stop]
            start = stop
