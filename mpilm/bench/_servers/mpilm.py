"""mpilm itself: the step of `python -m mpilm.train` in fast mode, with a server or without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mpilm.bench._contenders import Case, Place, Step, _ours
from mpilm.config import Config, Run, Sync

if TYPE_CHECKING:
    from mpilm.launch import World

LAYOUT = "mpi"
VARIANTS: tuple[str, ...] = ()
ENDLESS = 2**40     # steps: a server ends after the last one


def configuration(case: Case, place: Place) -> Config:
    """The case as `mpilm.train` would be told it."""
    run = Run(reproducible=False, precision="fp32" if "fp32" in place.variants else "bf16",
              compile=case.compile, threads=len(place.cores), steps=ENDLESS)
    return _ours.configuration(case, micro_batches=place.size, run=run,
                               sync=Sync(kind="parameter_server" if "server" in place.variants else "allreduce"))


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See `_contenders`."""
    from mpilm.launch import session

    with session() as world:
        config = configuration(case, place)
        if "server" in place.variants:
            with _with_server(config, world, case) as step:
                yield step
        else:
            yield _alone(config, world, case)


@contextmanager
def _with_server(config: Config, world: World, case: Case) -> Iterator[Step]:
    from mpilm import assemble
    from mpilm.model.slices import Slices
    from mpilm.state import TrainState, initial

    shape, decision = _ours.decided(config, world, case)
    roles = assemble.assign(config, world)
    if not roles.serving:
        core, batches = _ours.begun(assemble.build(config, world, shape, decision, roles), config, case)
        yield lambda: _ours.step(core, batches)
        return
    read = initial(Slices(shape), config.run.seed)
    server, update = assemble.serve(config, shape, decision, roles, TrainState(), read)

    def step() -> float:
        server.serve(update)
        server.drain()
        return 0.0

    yield step
    server.finish()


def _alone(config: Config, world: World, case: Case) -> Step:
    """One rank trains, and the first has nothing to do."""
    from mpilm import assemble

    shape, decision = _ours.decided(config, world, case)
    if world.rank == 0:
        return lambda: 0.0
    core, batches = _ours.begun(assemble.build(config, world.alone(), shape, decision), config, case)
    return lambda: _ours.step(core, batches)
