"""Values of a bucket side by side, without the gaps between its members.

A code says something about all values of a block. Zeros of a gap would enter it, and what comes back for them would be
there at the next step, where nobody overwrites it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Packed:
    """Of memory that has values in `runs` only, one after the other; nothing is copied where that is one run.

    Args:
        device: Of the memory, a torch device.

    Attributes:
        count: Values there are.
    """

    def __init__(self, runs: Sequence[slice], device: str = "cpu") -> None:
        self.runs = list(runs) or [slice(0, 0)]
        self.count = sum(run.stop - run.start for run in self.runs)
        self.copied = len(self.runs) > 1
        self.values = torch.empty(self.count if self.copied else 0, device=device)

    def gather(self, flat: Tensor) -> Tensor:
        """[count], the values of `flat`."""
        if not self.copied:
            return flat[self.runs[0]]
        return torch.cat([flat[run] for run in self.runs], out=self.values)

    def room(self, flat: Tensor) -> Tensor:
        """[count], where values may be put that `spread` brings to their places in `flat`."""
        return self.values if self.copied else flat[self.runs[0]]

    def spread(self, flat: Tensor) -> None:
        """Bring what was changed in `gather`'s or `room`'s memory back."""
        if self.copied:
            for run, part in zip(self.runs, self.values.split([run.stop - run.start for run in self.runs]),
                                 strict=True):
                flat[run] = part
