"""One process with all the threads and the whole batch: nothing to communicate, the honest rival on one machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpilm.bench._contenders import Case, Place, Step, _llama

LAYOUT = "one"
VARIANTS = ("compile",)


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See the package's docstring."""
    with _llama.torch_of(place):
        import torch

        net = _llama.model(case)
        compiled = torch.compile(net) if "compile" in place.variants else net
        yield _llama.stepper(compiled, case, place, _llama.autocast)
