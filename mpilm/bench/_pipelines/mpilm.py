"""mpilm itself: all ranks as one pipeline, or as replicas; the step of `python -m mpilm.train`, fast mode, bf16."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mpilm.bench._contenders import Case, Place, Step, Telling, _ours
from mpilm.bench._pipelines import MICRO_BATCHES, SCHEDULES
from mpilm.config import Config, Parallel, Run

LAYOUT = "mpi"
VARIANTS: tuple[str, ...] = ()


def configuration(case: Case, place: Place) -> Config:
    """The case as `mpilm.train` would be told it."""
    replicas = "dp" in place.variants
    schedule = next((name for name in SCHEDULES if name in place.variants), "1f1b")
    return _ours.configuration(
        case, micro_batches=place.size if "whole" in place.variants else min(MICRO_BATCHES, case.global_batch_size),
        run=Run(reproducible=False, precision="bf16", threads=len(place.cores),
                compile="off" if "eager" in place.variants else case.compile),
        parallel=Parallel(pp=1 if replicas else place.size, schedule=schedule))


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See `_contenders`. Tells how long a step's passes took, and how long this rank waited for others meanwhile."""
    with _ours.training(configuration(case, place), case) as (core, batches):
        from mpilm.comm import p2p

        def step() -> float:
            start = time.perf_counter()
            mine = core.pipeline.run(next(batches))
            done = time.perf_counter()
            p2p.barrier(core.mesh.pp)      # a stage that is through early waits too
            end = time.perf_counter()
            telling.seconds = {"passes": end - start, "waits": core.pipeline.wait_s + end - done}
            return _ours.update(core, mine)

        telling = Telling(step)
        yield telling
