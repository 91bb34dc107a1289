"""mpilm itself: the step of `python -m mpilm.train`, fast mode, with memory divided as the name says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpilm.bench._contenders import Case, Place, Step, _ours
from mpilm.config import Config, Run, Sync

LAYOUT = "mpi"
VARIANTS: tuple[str, ...] = ()


def configuration(case: Case, place: Place) -> Config:
    """The case as `mpilm.train` would be told it."""
    level = next((level for level in (1, 2, 3) if f"sharded{level}" in place.variants), 0)
    return _ours.configuration(
        case, micro_batches=place.size,
        run=Run(reproducible=False, precision="bf16", compile=case.compile, threads=len(place.cores)),
        sync=Sync(kind="sharded" if level else "allreduce", level=level or 1,
                  collective="ring" if "ring" in place.variants else "auto"))


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See `_contenders`."""
    with _ours.training(configuration(case, place), case) as (core, batches):
        yield lambda: _ours.step(core, batches)
