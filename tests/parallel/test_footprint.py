"""The memory that is predicted for layouts: that of a synchronizer to the byte, and what splitting must bring."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm import assemble, optim
from mpilm.arithmetic import Arithmetic
from mpilm.config import Config, Data, Model, Parallel, Run, Sync
from mpilm.data.loader import Batch
from mpilm.launch import session
from mpilm.model import activations, memory
from mpilm.model.activations import Work
from mpilm.model.context import WHOLE
from mpilm.model.gpt import GPT
from mpilm.model.shape import Shape
from mpilm.model.split import ALONE
from mpilm.parallel import exchange, footprint
from mpilm.parallel.context import Ring
from mpilm.parallel.tensor import Team
from mpilm.sync import _squares
from tests.helpers import everywhere
from tests.memory_cases import SHAPE, kept, part_of

HELD = ("weights", "masters", "optimizer", "gradients")
ELEMENT = {"fp32": 4, "bf16": 2}
SMALL = Shape(layers=2, width=64, heads=4, vocab_size=96)
DEEP = Shape(layers=14, width=256, heads=8, hidden=704, vocab_size=1024)


def measured(config, shape, precision, *, compiled):
    """Bytes that each rank's synchronizer holds after a step, of the rank that holds most."""
    decided = Arithmetic(precision, compiled, 1, 1, config.run.reproducible, "", "")
    with session() as world:
        core = assemble.build(config, world, shape, decided)
        assemble.restore(core, shape, config, None)
        tokens = np.zeros((len(core.slots), config.data.micro_batch_size, config.data.sequence_length), np.int64)
        core.pipeline.run(Batch(tokens, tokens, None))
        core.sync.step(core.update)
        held = core.sync.memory()
        return {name: max(world.comm.allgather(held[name])) for name in HELD}


def check(config, shape, precision, comm, *, compiled=False):
    stages = footprint.stages(config, shape, comm.size, element=ELEMENT[precision], compiled=compiled)
    expected = {name: max(getattr(stage, name) for stage in stages) for name in HELD}
    found = measured(config, shape, precision, compiled=compiled)
    near = all(abs(found[name] - expected[name]) < 64 for name in HELD)     # thirds are rounded bucket by bucket
    everywhere(comm, near, f"{config.sync}, {config.parallel}: {found} and not {expected}")


def small(collective="shared", *, reproducible=False, kind="allreduce", level=1, sequences=8, **parallel):
    """Buckets that hold all there is."""
    return Config(run=Run(reproducible=reproducible), model=Model(layers=2, width=64, heads=4),
                  data=Data(sequence_length=24, global_batch_size=sequences, micro_batch_size=1),
                  sync=Sync(collective=collective, kind=kind, level=level, bucket_mib=64),
                  parallel=Parallel(**parallel))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_replicas_hold_is_predicted_to_the_byte(precision, comm):
    for collective in ("shared", "ring"):
        options = {"collective": collective, "sequences": 2 * comm.size}
        check(small(**options), SMALL, precision, comm)
        for level in (1, 2, 3):
            check(small(kind="sharded", level=level, **options), SMALL, precision, comm)


@pytest.mark.parametrize("slots", [1, 2, 4, 8])
def test_gradients_that_are_not_summed_are_counted_by_slots(slots, comm, monkeypatch):
    """As where the update is compiled, which changes no size; those of many slots are summed."""
    monkeypatch.setattr(GPT, "compile_parts", lambda part: None)
    for module in (optim, _squares):
        monkeypatch.setattr(module, "compile_code", lambda function, *kind: function)
    for collective, reproducible in (("shared", slots > 1), ("ring", False)):
        if not (reproducible and comm.size & (comm.size - 1)):
            check(small(collective, reproducible=reproducible, sequences=slots * comm.size), SMALL, "bf16", comm,
                  compiled=True)


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("axis", ["pp", "tp"])
def test_what_parts_hold_is_predicted_to_the_byte(axis, comm):
    """In reproducible mode, whose sums along a tree take several buffers."""
    if axis == "tp" and comm.size == 3:
        pytest.skip("four heads are not divided by three")
    check(small(reproducible=True, **{axis: comm.size}), SMALL, "bf16", comm)


@pytest.mark.ranks(min=2, max=2)
@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_a_block_that_is_shared_keeps_what_is_counted(axis, comm):
    work = Work(2, 256, **{axis: comm.size})
    ring, team = (WHOLE, Team(exchange.build("auto", comm, rows=512, width=64, dtype=torch.bfloat16))) if axis == "tp" \
        else (Ring(comm), ALONE)
    for units in (range(1, 2), range(3, 4)):
        expected = activations.kept(SHAPE, units, work) - work.between(SHAPE) * (2 if units.stop < 4 else 1)
        found = kept(part_of(units, work, ring, team), work)
        everywhere(comm, found == expected, f"{units}: {found} and not {expected}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")     # the compiler warns of its own code
def test_a_compiled_block_keeps_what_is_counted():
    work = Work(2, 256, compiled=True)
    part = part_of(range(1, 2), work)
    part.compile_parts()
    assert kept(part, work) == activations.block(SHAPE, work)


def config(**parallel):
    """Of `DEEP`, with 16 micro-batches."""
    return Config(run=Run(reproducible=False), model=Model(layers=14, width=256, heads=8, hidden=704),
                  data=Data(sequence_length=256, global_batch_size=32, micro_batch_size=2),
                  parallel=Parallel(**parallel))


def largest(ranks, sync=None, **parallel):
    asked = config(**parallel)
    asked.sync = sync or asked.sync
    return footprint.largest(asked, DEEP, ranks)


@pytest.mark.serial
@settings(max_examples=30, deadline=None)
@given(axis=st.sampled_from(["pp", "tp", "cp"]), size=st.sampled_from([1, 2, 4]), recompute=st.booleans(),
       schedule=st.sampled_from(["gpipe", "1f1b", "zb"]))
def test_memory_falls_with_every_axis(axis, size, recompute, schedule):
    options = {"recompute": recompute, "schedule": schedule}
    one = largest(size, **{axis: size}, **options)
    two = largest(2 * size, **{axis: 2 * size}, **options)
    assert two.total < one.total
    if axis != "cp":
        assert two.optimizer < 0.7 * one.optimizer


@pytest.mark.serial
def test_what_is_held_is_divided_by_the_ranks_of_a_model():
    vectors = 8 * memory.BLOCK * (2 * DEEP.layers + 1)     # each a block, and whole on every rank of a team
    whole = largest(1).optimizer - vectors
    for ranks in (2, 4):
        assert largest(ranks, tp=ranks).optimizer - vectors == pytest.approx(whole / ranks, rel=0.1)
        assert largest(ranks, pp=ranks).optimizer == pytest.approx((whole + vectors) / ranks, rel=0.25)


@pytest.mark.serial
def test_schedules_keep_what_they_have_on_their_way():
    """1F1B as many micro-batches as there are stages, GPipe all; what deferred weight gradients need is kept too."""
    def kept(schedule):
        return [stage.activations for stage in footprint.stages(config(pp=4, schedule=schedule), DEEP, 4)]

    in_turns, all_at_once = kept("1f1b"), kept("gpipe")
    assert in_turns[1] > in_turns[2] > in_turns[3]
    assert all_at_once[1] * 3 == in_turns[1] * 16      # it has two stages after it, and there are 16 micro-batches
    assert max(in_turns) <= max(kept("zb")) < 2 * max(in_turns)
    assert max(in_turns) < max(kept("interleaved")) < max(all_at_once)
    assert largest(1, recompute=True).activations < largest(1).activations / 3


@pytest.mark.serial
def test_levels_divide_among_the_replicas_of_all_nodes():
    """Which share no memory between nodes."""
    by_level = [footprint.stages(_at(level), DEEP, 4, ranks_per_node=1)[0] for level in (0, 1, 2, 3)]
    totals = [level.total for level in by_level]
    assert totals == sorted(totals, reverse=True)
    assert by_level[1].optimizer == pytest.approx(by_level[0].optimizer / 4, rel=0.1)
    assert by_level[2].gradients < by_level[1].gradients
    assert by_level[3].weights < by_level[2].weights
    together = footprint.stages(_at(0), DEEP, 4)[0]
    assert together.optimizer == by_level[0].optimizer // 4


def _at(level):
    asked = config()
    asked.sync = Sync(kind="sharded" if level else "allreduce", level=max(1, level))
    return asked
