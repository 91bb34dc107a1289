"""DistributedDataParallel over Gloo: a process a rank.

Gradients are views into the buckets, and the graph is said to be static: both save work and change nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpilm.bench._contenders import Case, Place, Step, _llama

LAYOUT = "peers"
VARIANTS = ("compile",)


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See the package's docstring."""
    with _llama.process_group(place):
        import torch
        from torch.nn.parallel import DistributedDataParallel

        net = DistributedDataParallel(_llama.model(case), gradient_as_bucket_view=True, static_graph=True,
                                      broadcast_buffers=False)
        compiled = torch.compile(net) if "compile" in place.variants else net
        yield _llama.stepper(compiled, case, place, _llama.autocast)
