"""mpilm itself in any layout; the step of `python -m mpilm.train`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpilm.bench._contenders import Case, Place, Step, _ours
from mpilm.bench._layouts import configuration

LAYOUT = "mpi"
VARIANTS: tuple[str, ...] = ()


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See `_contenders`."""
    with _ours.training(configuration(case, place.variants), case) as (core, batches):
        yield lambda: _ours.step(core, batches)
