"""mpilm itself: the step of `python -m mpilm.train`, fast mode, with memory divided as the name says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle

from mpilm.bench._contenders import Case, Place, Step
from mpilm.config import Config, Data, Model, Optim, Run, Sync

LAYOUT = "mpi"
VARIANTS: tuple[str, ...] = ()
NUM_BATCHES = 8


def configuration(case: Case, place: Place) -> Config:
    """The case as `mpilm.train` would be told it."""
    level = next((level for level in (1, 2, 3) if f"sharded{level}" in place.variants), 0)
    return Config(run=Run(reproducible=False, precision="bf16", compile="on", threads=len(place.cores)),
                  model=Model(layers=case.layers, width=case.width, heads=case.heads, hidden=case.hidden),
                  data=Data(sequence_length=case.sequence_length, global_batch_size=case.global_batch_size,
                            micro_batch_size=case.global_batch_size // place.size),
                  optim=Optim(lr=3e-4, clip=1.0),
                  sync=Sync(kind="sharded" if level else "allreduce", level=level or 1,
                            collective="ring" if "ring" in place.variants else "auto"))


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See `_contenders`."""
    from mpilm.launch import session

    with session() as world:
        import numpy as np

        from mpilm import arithmetic, assemble
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
            mine = core.pipeline.run(next(batches))
            core.update.begin(core.update.applied)
            core.sync.step(core.update)
            return core.losses.mean(mine)

        yield step
