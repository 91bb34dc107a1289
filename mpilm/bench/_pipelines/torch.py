"""torch.distributed.pipelining over Gloo: Schedule1F1B, a stage a process, cut where ours is.

As a knowledgeable user would have it, the stages are of the model that the peers of `bench train` train; or, to compare
nothing but pipelines, of our blocks (_stages.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from mpilm.bench._contenders import Case, Place, Step, _llama
from mpilm.bench._pipelines import MICRO_BATCHES

LAYOUT = "peers"
VARIANTS: tuple[str, ...] = ()


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See `_contenders`."""
    with _llama.process_group(place):
        import torch
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        from mpilm.bench._pipelines import _stages

        kind = _stages.Blocks if "ours" in place.variants else _stages.Llama
        part = kind(case, place)
        slots = min(MICRO_BATCHES, case.global_batch_size)
        stage = PipelineStage(part.module, place.rank, place.size, torch.device("cpu"))
        # The last stage uses it; to the others it says that there will be a backward pass.
        schedule = Schedule1F1B(stage, slots, loss_fn=part.loss if part.last else torch.mean)
        everyone = Place(0, 1, place.cores, place.rendezvous, place.variants)   # both see the whole batch
        source = cycle(_llama.batches(case, everyone))

        def step() -> float:
            inputs, targets = next(source)
            losses: list[Any] = []
            given = (inputs,) if part.first else ()
            wanted = {"target": targets, "losses": losses} if part.last else {}
            with part.precision():
                schedule.step(*given, return_outputs=False, **wanted)
            part.update()
            return sum(float(loss.detach()) for loss in losses) / max(1, len(losses))

        yield step
