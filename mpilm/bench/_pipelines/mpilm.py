"""mpilm itself: all ranks as one pipeline, or as replicas; the step of `python -m mpilm.train`, fast mode, bf16."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle

from mpilm.bench._contenders import Case, Place, Step, Telling
from mpilm.bench._pipelines import MICRO_BATCHES, SCHEDULES
from mpilm.config import Config, Data, Model, Optim, Parallel, Run

LAYOUT = "mpi"
VARIANTS: tuple[str, ...] = ()
NUM_BATCHES = 8


def configuration(case: Case, place: Place) -> Config:
    """The case as `mpilm.train` would be told it."""
    replicas = "dp" in place.variants
    slots = place.size if "whole" in place.variants else min(MICRO_BATCHES, case.global_batch_size)
    schedule = next((name for name in SCHEDULES if name in place.variants), "1f1b")
    return Config(run=Run(reproducible=False, precision="bf16", threads=len(place.cores),
                          compile="off" if "eager" in place.variants else "on"),
                  model=Model(layers=case.layers, width=case.width, heads=case.heads, hidden=case.hidden),
                  data=Data(sequence_length=case.sequence_length, global_batch_size=case.global_batch_size,
                            micro_batch_size=case.global_batch_size // slots),
                  optim=Optim(lr=3e-4, clip=1.0),
                  parallel=Parallel(pp=1 if replicas else place.size, schedule=schedule))


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See `_contenders`. Tells how long a step's passes took, and how long this rank waited for others meanwhile."""
    from mpilm.launch import session

    with session() as world:
        import numpy as np

        from mpilm import arithmetic, assemble
        from mpilm.comm import p2p
        from mpilm.data.loader import Batch

        config = configuration(case, place)
        shape = assemble.shape_of(config, case.vocab_size)
        decision, _ = arithmetic.decide(config, world, shape, {})
        core = assemble.build(config, world, shape, decision)
        assemble.restore(core, shape, config, None)
        draw = np.random.default_rng(core.mesh.dp.rank)
        dimensions = (len(core.slots), config.data.micro_batch_size, case.sequence_length + 1)
        drawn = [draw.integers(case.vocab_size, size=dimensions) for _ in range(NUM_BATCHES)]
        batches = cycle(Batch(tokens[..., :-1], tokens[..., 1:], None) for tokens in drawn)

        def step() -> float:
            start = time.perf_counter()
            mine = core.pipeline.run(next(batches))
            done = time.perf_counter()
            p2p.barrier(core.mesh.pp)      # a stage that is through early waits too
            end = time.perf_counter()
            telling.seconds = {"passes": end - start, "waits": core.pipeline.wait_s + end - done}
            core.update.begin(core.update.applied)
            core.sync.step(core.update)
            return core.losses.mean(mine)

        telling = Telling(step)
        yield telling
