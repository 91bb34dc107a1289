"""mpilm itself, as a contender: the step of `python -m mpilm.train`, on batches that lie ready.

    with training(configuration(case, micro_batches=2, ...), case) as (core, batches):
        yield lambda: step(core, batches)

`decided` and `begun` are what it is made of, for contenders whose ranks do not all train.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

from mpilm.bench._contenders import Case
from mpilm.config import Config, Data, Model, Optim, Run

if TYPE_CHECKING:
    from mpilm.arithmetic import Arithmetic
    from mpilm.assemble import Core
    from mpilm.data.loader import Batch
    from mpilm.launch import World
    from mpilm.model.shape import Shape
    from mpilm.parallel.losses import SlotLosses

NUM_BATCHES = 8


def configuration(case: Case, *, micro_batches: int, run: Run, **sections: Any) -> Config:
    """The case as `mpilm.train` would be told it.

    Args:
        micro_batches: Of a step, over all ranks.
        run, sections: Further sections of the configuration.
    """
    return Config(run=run,
                  model=Model(layers=case.layers, width=case.width, heads=case.heads, hidden=case.hidden),
                  data=Data(sequence_length=case.sequence_length, global_batch_size=case.global_batch_size,
                            micro_batch_size=case.global_batch_size // micro_batches),
                  optim=Optim(lr=3e-4, clip=1.0), **sections)


@contextmanager
def training(config: Config, case: Case) -> Iterator[tuple[Core, Iterator[Batch]]]:
    """All that a step needs, in a session of its own. Random tokens, drawn before the clock runs; batches come round
    again."""
    from mpilm import startup
    from mpilm.launch import session

    with session() as world:
        with startup.loading():
            from mpilm import assemble

        shape, decision = decided(config, world, case)
        yield begun(assemble.build(config, world, shape, decision), config, case)


def decided(config: Config, world: World, case: Case) -> tuple[Shape, Arithmetic]:
    """The model's shape, and how it is computed. Collective over the world."""
    from mpilm import arithmetic, assemble

    shape = assemble.shape_of(config, case.vocab_size)
    return shape, arithmetic.decide(config, world, shape, {})[0]


def begun(core: Core, config: Config, case: Case) -> tuple[Core, Iterator[Batch]]:
    """With initial weights, and its batches. Collective over those who train, and whoever serves them."""
    import numpy as np

    from mpilm import assemble
    from mpilm.data.loader import Batch

    assemble.restore(core, assemble.shape_of(config, case.vocab_size), config, None)
    draw = np.random.default_rng(core.mesh.dp.rank)
    dimensions = (len(core.slots), config.data.micro_batch_size, case.sequence_length + 1)
    drawn = [draw.integers(case.vocab_size, size=dimensions) for _ in range(NUM_BATCHES)]
    return core, cycle(Batch(tokens[..., :-1], tokens[..., 1:], None) for tokens in drawn)


def update(core: Core, losses: SlotLosses) -> float:
    """What follows the passes of a step; the mean of everyone's losses."""
    core.update.begin(core.update.applied)
    core.sync.step(core.update)
    return core.losses.mean(losses)


def step(core: Core, batches: Iterator[Batch]) -> float:
    """Train on the next batch; the loss."""
    return update(core, core.pipeline.run(next(batches)))
