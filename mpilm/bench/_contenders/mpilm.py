"""mpilm itself: the step of `python -m mpilm.train`, on batches that lie ready.

"reproducible" sums along the fixed tree over four micro-batches, so the same bits come out on 1, 2 and 4 ranks; "slots"
has the same micro-batches in fast mode, so that the two show what the bits cost; the plain one takes a rank's whole
share as one micro-batch, in fast mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpilm.bench._contenders import Case, Place, Step, _ours
from mpilm.config import Config, Run

LAYOUT = "mpi"
VARIANTS = ("reproducible", "slots")
SLOTS = 4


def configuration(case: Case, *, reproducible: bool, micro_batches: int) -> Config:
    """The case as `mpilm.train` would be told it."""
    return _ours.configuration(
        case, micro_batches=micro_batches,
        run=Run(reproducible=reproducible, precision=case.precision, compile=case.compile,
                threads=0 if reproducible else 1))


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See the package's docstring."""
    config = configuration(case, reproducible="reproducible" in place.variants,
                           micro_batches=SLOTS if place.variants else place.size)
    with _ours.training(config, case) as (core, batches):
        yield lambda: _ours.step(core, batches)
