"""mpilm itself: the step of `python -m mpilm.train`, on batches that lie ready.

"reproducible" sums along the fixed tree over four micro-batches, so the same bits come out on 1, 2 and 4 ranks; the
plain one takes a rank's whole share as one micro-batch, in fast mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle

from mpilm.bench._contenders import Case, Place, Step
from mpilm.config import Config, Data, Model, Optim, Run

LAYOUT = "mpi"
VARIANTS = ("reproducible",)
SLOTS = 4
NUM_BATCHES = 8


def configuration(case: Case, *, reproducible: bool, size: int) -> Config:
    """The case as `mpilm.train` would be told it."""
    slots = SLOTS if reproducible else size
    return Config(run=Run(reproducible=reproducible, compile="on", threads=0 if reproducible else 1),
                  model=Model(layers=case.layers, width=case.width, heads=case.heads, hidden=case.hidden),
                  data=Data(sequence_length=case.sequence_length, global_batch_size=case.global_batch_size,
                            micro_batch_size=case.global_batch_size // slots),
                  optim=Optim(lr=3e-4, clip=1.0))


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See the package's docstring."""
    from mpilm.launch import session

    with session() as world:
        import numpy as np

        from mpilm import arithmetic, assemble
        from mpilm.data.loader import Batch

        config = configuration(case, reproducible="reproducible" in place.variants, size=place.size)
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
