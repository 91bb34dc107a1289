"""A pipeline whose passes sleep: our schedules, executor and messages are real, computing is not.

On fewer cores than stages, stages that compute take each other's time, and no schedule can help. Stages that sleep do
not. How long they sleep is measured at the start, on one stage of the case, by one process alone, in bf16 without
compiling: forward, the gradient of the input, and those of weights. All stages are alike; messages have their real
size. One step plays every schedule once, with the same times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mpilm.bench._contenders import Case, Place, Step, Telling
from mpilm.bench._pipelines import ASLEEP, MICRO_BATCHES

if TYPE_CHECKING:
    from mpilm.parallel.chunk import Chunk

LAYOUT = "mpi"
VARIANTS: tuple[str, ...] = ()
MEASURED = 7
LATE = "late.weight"
NAP_S = 0.01


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See `_contenders`. Tells also what the simulator says of the measured times."""
    from mpilm.launch import session

    with session() as world:
        import numpy as np
        import torch

        from mpilm.comm import p2p
        from mpilm.data.loader import Batch
        from mpilm.parallel import schedules, simulate
        from mpilm.parallel.pipeline import Pipeline

        torch.set_num_threads(1)
        times = _measured(case, world.comm, place.size)
        slots = min(MICRO_BATCHES, case.global_batch_size)
        shape = (case.global_batch_size // slots, case.sequence_length, case.width)
        batch = Batch(np.zeros((slots, *shape[:2]), np.int64), np.zeros((slots, 1), np.int64), None)
        stages = world.dup("stages")
        pipelines = dict[str, Pipeline]()
        simulated = dict[str, float]()
        for name in ASLEEP:
            schedule = schedules.get(name)
            chunk = _chunk(shape, times, last=world.rank == world.size - 1)
            pipelines[name] = Pipeline([chunk], _Slots(times[2]), stages, schedule, num_slots=slots,
                                       dtype=torch.bfloat16)
            timeline = simulate.play(schedule.all_ranks(world.size, slots), simulate.Cost(*times))
            simulated |= {f"{name} simulated passes": timeline.end, f"{name} simulated waits": timeline.bubble}

        def step() -> float:
            telling.seconds = dict(simulated)
            for name, pipeline in pipelines.items():
                p2p.barrier(stages)
                start = time.perf_counter()
                pipeline.run(batch)
                done = time.perf_counter()
                p2p.barrier(stages)
                end = time.perf_counter()
                telling.seconds |= {f"{name} passes": end - start, f"{name} waits": pipeline.wait_s + end - done}
            return 0.0

        telling = Telling(step)
        yield telling


class _Slots:
    """In place of a synchronizer: weight gradients take their time, whichever pass computes them."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def begin_slot(self, slot: int, names: Collection[str], later: Collection[str] = ()) -> None:
        if LATE in names:
            time.sleep(self.seconds)

    def end_slot(self) -> None: ...


def _chunk(shape: tuple[int, ...], times: tuple[float, ...], *, last: bool) -> Chunk:
    import torch
    from torch import Tensor, nn

    forward_s, input_s, _ = times

    class Sleeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            time.sleep(forward_s)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            time.sleep(input_s)
            return gradients[0].clone()

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = last
            self.late = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)

        def input_shape(self, stage: int, slot: Sequence[int]) -> tuple[int, ...]:
            return shape

        def rows(self, slot: Sequence[int]) -> tuple[int, ...]:
            return tuple(slot)

        def linear_rows(self) -> dict[nn.Linear, tuple[int, ...]]:
            return {self.late: (1,)}

        def forward(self, inputs: Tensor, targets: Tensor, extra: None, hidden: Tensor | None) -> Tensor:
            x = torch.zeros(shape, dtype=torch.bfloat16) if hidden is None else hidden
            x = x + self.late(torch.ones(1, 1, dtype=torch.bfloat16))
            y: Tensor = Sleeps.apply(x)
            return y.float().mean() if last else y

    return Stage()


def _measured(case: Case, comm: Any, stages: int) -> tuple[float, ...]:
    """Seconds of a micro-batch's forward pass through one of `stages`, and of both halves of its backward pass.

    Medians, by rank 0 while the others sleep. Collective over `comm`.
    """
    times = _time(case, stages) if comm.rank == 0 else None
    gate = comm.Ibarrier()
    while not gate.Test():
        time.sleep(NAP_S)
    return tuple(comm.bcast(times))


def _time(case: Case, stages: int) -> tuple[float, ...]:
    import torch

    from mpilm.model.gpt import GPT
    from mpilm.model.shape import Shape
    from mpilm.parallel.deferred import Deferred

    layers = max(1, case.layers // stages)
    shape = Shape(layers=layers + 2, width=case.width, heads=case.heads, hidden=case.hidden, vocab_size=case.vocab_size)
    part = GPT(shape, range(1, 1 + layers))
    part.initialize(seed=1)
    part.to(torch.bfloat16)
    size = case.global_batch_size // min(MICRO_BATCHES, case.global_batch_size)
    tokens = torch.zeros(size, case.sequence_length, dtype=torch.int64)
    deferred = Deferred(part)
    deferred.prepare(tuple(tokens.shape))
    seen = []
    for _ in range(MEASURED):
        hidden = torch.randn(*tokens.shape, case.width, dtype=torch.bfloat16, requires_grad=True)
        forward, output = _timed(lambda: part(tokens, None, None, hidden))      # noqa: B023 - called at once
        first, half = _timed(lambda: deferred.backward(output, torch.ones_like(output), hidden))    # noqa: B023
        second, _ = _timed(half.weights)
        seen.append((forward, first, second))
    return tuple(statistics.median(times) for times in zip(*seen, strict=True))


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result
