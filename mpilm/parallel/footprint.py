"""The memory that a rank is expected to need, for any layout: arithmetic, before anything is built.

    footprint.largest(config, shape, ranks=8).total          # bytes of the rank that needs most
    footprint.stages(config, shape, ranks=8)                 # one Memory for each stage of the pipeline

What is held at all times (model/memory.py), what every micro-batch on its way has left (model/activations.py, as many
as the schedule lets be on their way), and what ranks tell each other. An interpreter, torch and an MPI, which a program
without a model takes too, are not in it.

All of this is counted but the gaps: tensors of many sizes come and go, and glibc's heap cannot always put one where
another was. Their size was measured (bench/memory.py): three quarters of what comes and goes in passes, and something
of the largest tensor, which is drawn at full size and copied at the start. GPipe has fewer of them than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mpilm.config import Config
from mpilm.flat import bytes_unsummed
from mpilm.model import activations, memory
from mpilm.model.activations import Work
from mpilm.model.memory import Division, Memory
from mpilm.model.shape import Shape
from mpilm.parallel import layout, schedules
from mpilm.parallel.schedules import Action, Kind

BF16 = 2
BY_MEMORY = ("auto", "shared")
GAPS = 0.75             # of activations and workspace
DRAWN = 1.5             # of the largest tensor in float32
MESSAGES = 6            # between stages: three receives are posted, and as many sends may not have arrived
TURNS = 2               # halves of the memory through which ranks exchange activations
BLOCKS = 3              # of keys and values that a ring has at a time: mine, that in hand, that which comes


def largest(config: Config, shape: Shape, ranks: int, *, element: int = BF16, compiled: bool = False,
            ranks_per_node: int = 0) -> Memory:
    """Of the rank that needs most; arguments as of `stages`."""
    every = stages(config, shape, ranks, element=element, compiled=compiled, ranks_per_node=ranks_per_node)
    return max(every, key=lambda stage: stage.total)


def stages(config: Config, shape: Shape, ranks: int, *, element: int = BF16, compiled: bool = False,
           ranks_per_node: int = 0) -> list[Memory]:
    """Of a rank of every stage of the pipeline.

    Args:
        config: Of a layout that `layout.check` lets pass.
        ranks: In all.
        element: Bytes of an element of what the model computes with: 2 in bf16, 4 in fp32.
        compiled: Blocks and updates are, and ranks compute on CPUs, without ULFM.
        ranks_per_node: 0: all ranks are on one node.
    """
    parallel, data = config.parallel, config.data
    work = Work(data.micro_batch_size, data.sequence_length, element, parallel.cp, parallel.tp, compiled,
                parallel.recompute, data.mask_documents)
    dealt = layout.stages(config, shape)
    return [_stage(config, shape, work, stage, layout.of_rank(dealt, stage, parallel.pp),
                   _division(config, ranks, stage, work, ranks_per_node or ranks))
            for stage in range(parallel.pp)]


def _stage(config: Config, shape: Shape, work: Work, stage: int, units: Sequence[range], division: Division) -> Memory:
    schedule = schedules.get(config.parallel.schedule)
    actions = schedule.actions(stage, config.parallel.pp, division.num_slots, len(units))
    kept, workspace = max(_passes(actions, shape, units, work), key=sum)
    gaps = round(GAPS * (kept + workspace) + DRAWN * memory.FLOAT * memory.largest_tensor(shape, units))
    return replace(memory.held(shape, units, division), activations=kept, workspace=workspace, gaps=gaps,
                   messages=_messages(config, shape, work))


def _passes(actions: Sequence[Action], shape: Shape, units: Sequence[range], work: Work) -> Iterator[tuple[int, int]]:
    """(left by all passes so far, needed besides) of every pass."""
    left, later, needed = ([count(shape, run, work) for run in units]
                           for count in (activations.kept, activations.deferred, activations.needed))
    held = 0
    for action in actions:
        chunk = action.chunk
        held += left[chunk] if action.kind is Kind.FORWARD else 0
        yield held, needed[chunk]
        held -= {Kind.FORWARD: 0, Kind.BACKWARD: left[chunk], Kind.INPUT: left[chunk] - later[chunk],
                 Kind.WEIGHT: later[chunk]}[action.kind]


def _division(config: Config, ranks: int, stage: int, work: Work, ranks_per_node: int) -> Division:
    parallel, sync = config.parallel, config.sync
    dp = ranks // (parallel.pp * parallel.cp * parallel.tp)
    slots = [len(run) for run in layout.slots(config, dp, reproducible=config.run.reproducible)]
    level = sync.level if sync.kind == "sharded" else 0
    plain = sync.kind == "allreduce" and sync.compress == "none" and len(set(slots)) == 1
    division = Division(dp * parallel.cp, _sharing(config, dp, stage, ranks_per_node),
                        level if len(set(slots)) == 1 else min(level, 1),       # as sync/sharded.py does
                        parallel.tp, work.element, max(slots), config.run.reproducible)
    unsummed = bytes_unsummed(division.num_slots, division.replicas, element=work.element, buffers=division.buffers)
    able = plain and work.compiled and division.sharing == division.replicas and unsummed   # as in sync/allreduce.py
    return replace(division, gradient=unsummed // division.buffers) if able else division


def _sharing(config: Config, dp: int, stage: int, ranks_per_node: int) -> int:
    """Replicas that are on one node, and have memory there together; of the node with the fewest."""
    if config.sync.collective not in BY_MEMORY:
        return 1
    parallel = config.parallel
    hosts = Counter((((copy * parallel.pp + stage) * parallel.cp + share) * parallel.tp) // ranks_per_node
                    for copy in range(dp) for share in range(parallel.cp))
    return min(hosts.values())


def _messages(config: Config, shape: Shape, work: Work) -> int:
    between_stages = MESSAGES * work.between(shape) if config.parallel.pp > 1 else 0
    keys = 2 * work.tokens // work.tp * shape.kv_width
    around_ring = (BLOCKS * work.element + 2 * work.wide) * keys if work.cp > 1 else 0
    room = work.tokens * max(shape.width * work.element, 2 * work.wide)
    return between_stages + around_ring + (TURNS * room if work.tp > 1 else 0)
