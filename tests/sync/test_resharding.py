"""What one way of dividing memory saves, any other way resumes from: the same bits as without a stop."""

from __future__ import annotations

import numpy as np
import pytest

from mpilm.data.loader import Batch
from mpilm.launch import session
from tests.helpers import everywhere
from tests.training_cases import LENGTH, build, configuration, windows

WAYS = {"allreduce": {"kind": "allreduce"}} | {f"level {level}": {"kind": "sharded", "level": level}
                                               for level in (1, 2, 3)}


def step(core, number):
    """One step; its loss and gradient norm."""
    tokens = windows(number).reshape(-1, 1, LENGTH + 1)[list(core.slots)]
    mine = core.pipeline.run(Batch(tokens[..., :-1], tokens[..., 1:], None))
    core.update.begin(number)
    core.sync.step(core.update)
    return core.losses.mean(mine), core.sync.grad_norm


def saved(core, comm):
    """(state, parameter) -> values, put together from what every rank offers; each element exactly once."""
    offered = core.sync.runs(core.mesh.replicas.rank, core.mesh.replicas.size)
    whole, times = {}, {}
    for state, name, first, values in (run for runs in comm.allgather(offered) for run in runs):
        key = state, name
        length = max(first + values.size, whole[key].size if key in whole else 0)
        for arrays in (whole, times):
            arrays.setdefault(key, np.zeros(length, np.float32)).resize(length, refcheck=False)
        whole[key][first:first + values.size] = values
        times[key][first:first + values.size] += 1
    assert all((count == 1).all() for count in times.values()), "not everything exactly once"
    return whole


@pytest.mark.turns(at=(1, 3))
@pytest.mark.parametrize("before", WAYS)
def test_any_way_goes_on_as_any_other(before, comm):
    """Also from two stages to none, and back."""
    collective = "tree" if comm.size & (comm.size - 1) == 0 else "shared"
    stages = [1, 2] if comm.size % 2 == 0 else [1]
    with session() as world:
        undisturbed = build(configuration(collective), world)
        expected = [step(undisturbed, number) for number in range(2)]
        first = build(configuration(collective, **WAYS[before], pp=stages[-1]), world)
        everywhere(comm, step(first, 0) == expected[0])
        state = saved(first, comm)
        for after, pp in [(name, stages[number % len(stages)]) for number, name in enumerate(WAYS)]:
            other = build(configuration(collective, **WAYS[after], pp=pp), world)
            other.sync.load(lambda kind, name, start, count: state[kind, name][start:start + count])
            other.update.applied = 1
            everywhere(comm, step(other, 1) == expected[1], f"{before} to {after}, pp {pp}")
        world.comm.Barrier()
