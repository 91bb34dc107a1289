"""The weights that the model computes with, where parameters lie as views: whole at all times, or only when needed.

    Kept        whole; one copy for all ranks that the collective has share memory
    Gathered    a rank keeps its segment (the float32 masters) and nothing else; the rest is gathered for the time of a
                module's forward or backward pass

Autograd, and code that torch.compile made, remember where weights lay in the forward pass. So the address of gathered
weights never changes: what comes and goes is the memory behind it. Letting go gives the pages back to the system
(madvise(2), MADV_DONTNEED), and the next gathering fills new ones. FSDP has the same effect on torch's own storages by
resizing them to nothing (arXiv 2304.11277).
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch

from mpilm import bridge
from mpilm.comm.worker import Call, Inline, Worker


class Kept:
    """Whole weights. Collective over the collective's communicator, like every method.

    Attributes:
        flat: [count] in `dtype`.
        masters: float32, my segment; the same memory as `flat` where that is float32.
        nbytes: What this rank holds of them, a share of what ranks have in common.
        own_bytes: Of masters beside them.
    """

    def __init__(self, count: int, own: slice, dtype: torch.dtype, collective: Any, worker: Worker | Inline) -> None:
        self.collective, self.own, self.worker = collective, own, worker
        self.array = collective.allocate_common(count, bridge.array_dtype(dtype))
        self.flat = bridge.tensor(self.array, dtype)
        self.shard = self.flat[own]
        self.masters = (self.shard if dtype == torch.float32
                        else torch.zeros(own.stop - own.start, device=collective.device.torch))
        self.nbytes = self.array.nbytes // collective.owners.size
        self.own_bytes = 0 if self.masters is self.shard else self.masters.nbytes

    def changed(self) -> None:
        """My segment of `flat` is new: hand it round."""
        self.worker.submit(self.collective.allgather, self.array)


class Tally:
    """Bytes that are there now, and the most there ever were."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, nbytes: int) -> None:
        """So many more; less when negative."""
        self.now += nbytes
        self.most = max(self.most, self.now)


class Gathered:
    """Weights that come and go. Collective over the collective's communicator: all ranks fetch in the same order.

    Attributes:
        flat: [count] in `dtype`; of use from `wait` to `release`.
        used: It was fetched since the last change.
        masters: float32, my segment, which the update changes.
    """

    def __init__(self, count: int, own: slice, dtype: torch.dtype, collective: Any, worker: Worker | Inline,
                 tally: Tally) -> None:
        self.collective, self.own, self.worker, self.tally = collective, own, worker, tally
        self.pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.array = np.frombuffer(self.pages, bridge.array_dtype(dtype))
        self.flat = bridge.tensor(self.array, dtype)
        self.masters = self.shard = torch.zeros(own.stop - own.start)
        self.nbytes, self.own_bytes = 0, self.masters.nbytes
        self.coming: Call | None = None
        self.used = False

    def fetch(self) -> None:
        """Begin to gather, unless that was done."""
        self.used = True
        if self.coming is None:
            self.tally.add(self.array.nbytes)
            self.coming = self.worker.submit(self._fill)

    def wait(self) -> None:
        """The weights are there when this returns."""
        self.fetch()
        assert self.coming is not None
        self.worker.until(self.coming)

    def release(self) -> None:
        """Give the memory back, once what is on its way has come."""
        if self.coming is not None:
            self.worker.until(self.coming)
            self.coming = None
            self.tally.add(-self.array.nbytes)
            self.pages.madvise(mmap.MADV_DONTNEED)

    def changed(self) -> None:
        """The masters are new: what was gathered before is of no use."""
        self.release()
        self.used = False

    def _fill(self) -> None:
        self.flat[self.own].copy_(self.masters)
        self.collective.allgather(self.array)


Weights = Kept | Gathered
