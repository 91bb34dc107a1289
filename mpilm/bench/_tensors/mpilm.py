"""mpilm itself: all ranks share every layer, or each has a share of the batch; fast mode, bf16, compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpilm.bench._contenders import Case, Place, Step, _ours
from mpilm.config import Config, Parallel, Run

LAYOUT = "mpi"
VARIANTS: tuple[str, ...] = ()


def configuration(case: Case, place: Place) -> Config:
    """The case as `mpilm.train` would be told it."""
    shared = "tp" in place.variants
    return _ours.configuration(
        case, micro_batches=1 if shared else place.size,
        run=Run(reproducible=False, precision="bf16", compile=case.compile, threads=len(place.cores)),
        parallel=Parallel(tp=place.size if shared else 1))


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See `_contenders`."""
    with _ours.training(configuration(case, place), case) as (core, batches):
        yield lambda: _ours.step(core, batches)
