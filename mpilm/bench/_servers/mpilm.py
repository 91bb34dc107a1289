"""mpilm itself: the step of `python -m mpilm.train` in fast mode, with a server or without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING

from mpilm.bench._contenders import Case, Place, Step
from mpilm.config import Config, Data, Model, Optim, Run, Sync

if TYPE_CHECKING:
    from mpilm.arithmetic import Arithmetic
    from mpilm.assemble import Core
    from mpilm.launch import World
    from mpilm.model.shape import Shape

LAYOUT = "mpi"
VARIANTS: tuple[str, ...] = ()
NUM_BATCHES = 8
ENDLESS = 2**40


def configuration(case: Case, place: Place) -> Config:
    """The case as `mpilm.train` would be told it."""
    return Config(run=Run(reproducible=False, precision="fp32" if "fp32" in place.variants else "bf16",
                          compile="on" if case.width >= 64 else "off", threads=len(place.cores), steps=ENDLESS),
                  model=Model(layers=case.layers, width=case.width, heads=case.heads, hidden=case.hidden),
                  data=Data(sequence_length=case.sequence_length, global_batch_size=case.global_batch_size,
                            micro_batch_size=case.global_batch_size // place.size),
                  optim=Optim(lr=3e-4, clip=1.0, schedule="wsd"),
                  sync=Sync(kind="parameter_server" if "server" in place.variants else "allreduce"))


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See `_contenders`."""
    from mpilm.launch import session

    with session() as world:
        from mpilm import arithmetic, assemble

        config = configuration(case, place)
        shape = assemble.shape_of(config, case.vocab_size)
        decision, _ = arithmetic.decide(config, world, shape, {})
        if "server" in place.variants:
            yield _with_server(config, world, shape, decision, case)
        elif world.rank == 0:
            yield lambda: 0.0
        else:
            core = assemble.build(config, world.alone(), shape, decision)
            assemble.restore(core, shape, config, None)
            yield _stepper(core, config, case)


def _with_server(config: Config, world: World, shape: Shape, decision: Arithmetic, case: Case) -> Step:
    from mpilm import assemble
    from mpilm.model.slices import Slices
    from mpilm.state import TrainState, initial

    roles = assemble.assign(config, world)
    if not roles.serving:
        core = assemble.build(config, world, shape, decision, roles)
        assemble.restore(core, shape, config, None)
        return _stepper(core, config, case)
    read = initial(Slices(shape), config.run.seed)
    server, update = assemble.serve(config, shape, decision, roles, TrainState(), read)

    def step() -> float:
        server.serve(update)
        server.finish()
        return 0.0

    return step


def _stepper(core: Core, config: Config, case: Case) -> Step:
    import numpy as np

    from mpilm.data.loader import Batch

    draw = np.random.default_rng(1)
    dimensions = (len(core.slots), config.data.micro_batch_size, case.sequence_length + 1)
    drawn = [draw.integers(case.vocab_size, size=dimensions) for _ in range(NUM_BATCHES)]
    batches = cycle(Batch(tokens[..., :-1], tokens[..., 1:], None) for tokens in drawn)

    def step() -> float:
        mine = core.pipeline.run(next(batches))
        core.update.begin(core.update.applied)
        core.sync.step(core.update)
        return core.losses.mean(mine)

    return step
