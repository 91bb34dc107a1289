"""What a rank holds at every level of sharding, and what comes and goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpilm.comm import collectives
from mpilm.comm.collectives import nothing_more
from mpilm.comm.node import Node
from mpilm.comm.order import BLOCK, segments
from mpilm.comm.worker import Inline, Worker
from mpilm.data.loader import Batch
from mpilm.launch import session
from mpilm.sync._gradients import Passing, Room
from mpilm.sync._layout import Parameter, lay_out_modules
from mpilm.sync._slots import running_visits
from mpilm.sync._weights import Gathered, Tally
from tests.helpers import everywhere
from tests.training_cases import LENGTH, SEQUENCES, batch_of, build, sharded

LEVELS = (1, 2, 3)
every_level = pytest.mark.parametrize("level", LEVELS)


@every_level
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_what_the_arithmetic_says(level, precision, comm):
    """Counted from parameters and ranks alone; every parameter of the small model is padded to whole blocks."""
    if comm.size & (comm.size - 1):
        pytest.skip("level 1 in reproducible mode")
    with session() as world:
        core = build(sharded("tree", level), world, precision=precision)
        core.pipeline.run(batch_of(core))
        core.update.begin(0)
        core.sync.step(core.update)
        held, parameters = core.sync.memory(), core.parameters()
        world.comm.Barrier()
    modules = {}
    for name, parameter in parameters.items():
        blocks = -(-parameter.numel() // BLOCK)
        module = name.rpartition("layers.")[2].split(".")[0] if level > 1 else name
        modules[module] = modules.get(module, 0) + blocks * BLOCK
    if level > 1:
        modules = {module: max(count, comm.size * BLOCK) for module, count in modules.items()}
        mine = sum(segments(count, comm.size)[comm.rank].stop - segments(count, comm.size)[comm.rank].start
                   for count in modules.values())
    else:
        mine = sum(bucket.own.stop - bucket.own.start for bucket in core.sync.buckets)
        assert sum(comm.allgather(mine)) == sum(bucket.layout.count for bucket in core.sync.buckets)
    whole, width = sum(modules.values()), 2 if precision == "bf16" else 4
    slots = SEQUENCES // comm.size
    counter = max(1, (slots - 1).bit_length())
    sizes = list(modules.values())[::-1]
    rooms = max(sizes[::2]) + max(sizes[1::2])
    padded = sum(bucket.layout.count for bucket in core.sync.buckets)
    expected = {"optimizer": 2 * 4 * mine,
                "gradients": 4 * counter * padded if level == 1 else 4 * (counter * mine + rooms)}
    if level < 3 or comm.size == 1:
        expected |= {"weights": width * (padded if level == 1 else whole), "masters": 4 * mine if width == 2 else 0}
    else:
        expected |= {"weights": width * 2 * max(sizes), "masters": 4 * mine}
    everywhere(comm, held["weights"] <= expected.pop("weights"), str(held))
    everywhere(comm, {kind: held[kind] for kind in expected} == expected, f"{held} {expected}")
    everywhere(comm, held["weights"] > 0)


@pytest.mark.ranks(min=2)
def test_weights_are_there_only_while_they_are_needed(comm):
    """Two modules' at a time; and only zeros are left of those that went, under the same address."""
    collective = "ring"
    with session() as world:
        core = build(sharded(collective, 3, reproducible=False, sequences=2 * comm.size), world)
        weights = [bucket.weights for bucket in core.sync.buckets]
        seen = []
        core.parts[0].layers["1"].register_forward_pre_hook(
            lambda *_: seen.append([bool(weight.array.any()) for weight in weights]))
        addresses = [weight.array.ctypes.data for weight in weights]
        tokens = np.zeros((len(core.slots), 1, LENGTH + 1), np.int64)
        core.pipeline.run(Batch(tokens[..., :-1], tokens[..., 1:], None))
        core.sync.worker.wait()
        # buckets: head, norm, layer 1, layer 0, embedding; the norm may be on its way already
        everywhere(comm, all([row[0], *row[2:]] == [False, True, False, False] for row in seen), str(seen))
        everywhere(comm, not any(weight.array.any() for weight in weights[:-1]), "all but the embedding's are gone")
        everywhere(comm, [weight.array.ctypes.data for weight in weights] == addresses)
        world.comm.Barrier()


def test_gathered_weights_go_back_to_the_system(comm):
    """Unwritten memory of a process is zero."""
    class Everyone:
        """A collective whose other ranks have ones."""

        def allgather(self, buffer):
            buffer[2:] = 1

    tally = Tally()
    weights = Gathered(4, slice(0, 2), torch.float32, Everyone(), Inline(), tally)
    for value in (3.0, 4.0):
        weights.masters[:] = value
        weights.wait()
        assert (weights.flat.tolist(), tally.now) == ([value, value, 1, 1], 16)
        weights.release()
        assert (weights.flat.tolist(), tally.now, tally.most) == ([0, 0, 0, 0], 0, 16)


@pytest.mark.parametrize("worker", [Worker, Inline])
def test_gradients_on_their_way_are_summed_whoever_is_in_the_room(worker, comm):
    """Two buckets that fill at the same time have one room between them; a parameter without a gradient has zeros."""
    node = Node.build(comm)
    ring = collectives.get("ring")(comm, node)
    worker = worker("sums") if worker is Worker else worker()
    parameters = [Parameter(name, 3, decay=True) for name in ("0.a", "0.b", "1.a")]
    layouts = lay_out_modules(parameters, owners=comm.size)
    room = Room(max(layout.count for layout in layouts), ring, worker)
    room.memory[:] = np.nan     # what the last one left there
    owns = [segments(layout.count, comm.size)[comm.rank] for layout in layouts]
    passing = [Passing(layout, ring, own, running_visits(2), room) for layout, own in zip(layouts, owns, strict=True)]
    for slot in range(2):
        for gradients in passing:
            for member in gradients.layout.members:
                value = None if member.name == "0.b" else torch.full((3,), float(1 + comm.rank + slot))
                gradients.visit(member, slot, value)
        for gradients in passing:
            gradients.departed(slot, worker.submit(gradients.depart(slot), nothing_more))
    worker.wait()
    total = sum(1 + rank + slot for rank in range(comm.size) for slot in range(2))
    for gradients, own in zip(passing, owns, strict=True):
        whole = torch.zeros(gradients.layout.count)
        for member in gradients.layout.members:
            whole[member.start:member.start + 3] = 0 if member.name == "0.b" else total
        everywhere(comm, torch.equal(gradients.own, whole[own]), f"{gradients.own[:4]} {total}")
    worker.close()
    ring.free()
    node.free()
