"""What servers and workers must see alike: the buckets, and the messages that a worker's gradients make."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mpilm.comm import arrays
from mpilm.sync._layout import Layout, Parameter, lay_out

FLOAT_BYTES = 4


def server_layouts(parameters: Mapping[str, torch.nn.Parameter], decayed: set[str], *, bucket_mib: float,
                   servers: int) -> list[Layout]:
    """The buckets, each of which is cut into one segment a server: the same on servers and workers."""
    sizes = [Parameter(name, p.numel(), name in decayed) for name, p in parameters.items()]
    return lay_out(sizes, int(bucket_mib * 2**20 / FLOAT_BYTES), owners=servers)


def pushed(gradients: np.ndarray, *, seen: bool) -> list[np.ndarray]:
    """The messages that gradients make; an empty one where the server sees them."""
    return [gradients[:0]] if seen else arrays.messages(gradients)
