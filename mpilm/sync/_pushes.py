"""What servers and workers must see alike: the buckets, and what a worker's gradients travel as.

    worker    Push: gradients, residual  --code-->  messages
    server                               messages  --decode-->  gradients: Arrival

Without compression, and in its warm-up, messages are the gradients themselves; to a server that sees them anyway, an
empty one says that they are there. Codes always travel, so that what is computed does not depend on who sits where.
Both ends know how many updates have been made when a worker got its parameters, and so when codes begin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mpilm.comm import arrays
from mpilm.sync._layout import Layout, described, lay_out
from mpilm.sync.compress import Codec
from mpilm.sync.compress._packed import Packed

FLOAT_BYTES = 4


def server_layouts(parameters: Mapping[str, torch.nn.Parameter], decayed: set[str], *, bucket_mib: float,
                   servers: int) -> list[Layout]:
    """The buckets, each of which is cut into one segment a server: the same on servers and workers."""
    return lay_out(described(parameters, decayed), int(bucket_mib * 2**20 / FLOAT_BYTES), owners=servers)


class Push:
    """The segment of a worker's bucket that goes to one server.

    Args:
        gradients: Float32, where they will be each time.
        runs: Where among them there are any.
        seen: The server sees them there.
    """

    def __init__(self, gradients: np.ndarray, runs: Sequence[slice], codec: Codec | None, *, seen: bool) -> None:
        self.gradients, self.codec, self.seen = gradients, codec, seen
        self.packed = Packed(runs if codec else ())
        self.lost = torch.zeros(self.packed.count)
        self.data = np.empty(codec.size(self.packed.count) if codec else 0, np.uint8)

    def messages(self, *, coded: bool) -> list[np.ndarray]:
        """What is sent of the gradients that are there now."""
        if not coded or self.codec is None:
            return [self.gradients[:0]] if self.seen else arrays.messages(self.gradients)
        self.codec.squeeze(self.packed.gather(torch.from_numpy(self.gradients)), self.lost, self.data)
        if not torch.isfinite(self.lost.sum()):     # of gradients that were not finite; this update will be skipped
            self.lost.zero_()
        return arrays.messages(self.data)


class Arrival:
    """The same segment, at the server: one worker's.

    Args:
        gradients: Where they are to be when `take` has been called.
    """

    def __init__(self, gradients: np.ndarray, runs: Sequence[slice], codec: Codec | None, *, seen: bool) -> None:
        self.gradients, self.codec, self.seen = gradients, codec, seen
        self.packed = Packed(runs if codec else ())
        self.data = np.empty(codec.size(self.packed.count) if codec else 0, np.uint8)
        self.coded = False

    def messages(self, *, coded: bool) -> list[np.ndarray]:
        """What is received into."""
        self.coded = coded
        if coded:
            return arrays.messages(self.data)
        return [self.gradients[:0]] if self.seen else arrays.messages(self.gradients)

    def take(self) -> np.ndarray:
        """The gradients, once all messages are here."""
        if self.coded and self.codec:
            flat = torch.from_numpy(self.gradients)
            self.codec.decode(self.data, self.packed.room(flat))
            self.packed.spread(flat)
        return self.gradients

    @property
    def nbytes(self) -> int:
        """Held here and not by the worker."""
        return self.data.nbytes + (0 if self.seen else self.gradients.nbytes)
