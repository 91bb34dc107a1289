"""torch.distributed.pipelining over Gloo: Schedule1F1B, a stage a process, of the blocks that ours has.

The same model, cut at the same place: bf16 weights, float32 masters, fused AdamW, clipping by the global norm. The last
stage's loss is our head's, which computes its gradient on the way; blocks are compiled as ours are, or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from mpilm.bench._contenders import Case, Place, Step, _llama
from mpilm.bench._pipelines import MICRO_BATCHES
from mpilm.bench._pipelines.mpilm import configuration

LAYOUT = "peers"
VARIANTS: tuple[str, ...] = ()
CLIP = 1.0


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See `_contenders`."""
    with _llama.process_group(place):
        import torch
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        part = _part(case, place)
        slots = min(MICRO_BATCHES, case.global_batch_size)
        size, length = case.global_batch_size // slots, case.sequence_length
        tokens = torch.zeros(size, length, dtype=torch.int64)
        stage = PipelineStage(_module(part, tokens), place.rank, place.size, torch.device("cpu"))
        # The last stage uses it; to the others it says that there will be a backward pass.
        schedule = Schedule1F1B(stage, slots, loss_fn=part.lm_head.loss if part.last else torch.mean)
        update = _updater(part)
        everyone = Place(0, 1, place.cores, place.rendezvous, place.variants)   # both see the whole batch
        source = cycle(_llama.batches(case, everyone))

        def step() -> float:
            inputs, targets = next(source)
            losses: list[Any] = []
            given = (inputs,) if part.first else ()
            wanted = {"target": targets, "losses": losses} if part.last else {}
            schedule.step(*given, return_outputs=False, **wanted)
            update()
            return sum(float(loss.detach()) for loss in losses) / max(1, len(losses))

        yield step


def _part(case: Case, place: Place) -> Any:
    """This process's part of the model, with initial weights in bf16."""
    import torch

    from mpilm.model.gpt import GPT
    from mpilm.model.shape import Shape
    from mpilm.parallel import layout

    config = configuration(case, place)
    shape = Shape(layers=case.layers, width=case.width, heads=case.heads, hidden=case.hidden,
                  vocab_size=case.vocab_size)
    part = GPT(shape, layout.stages(config, shape)[place.rank])
    part.initialize(seed=1)
    part.to(torch.bfloat16)
    if "eager" not in place.variants:
        part.compile_parts()
    return part


def _module(part: Any, tokens: Any) -> Any:
    """The part as a stage: tokens or activations in, activations out, of the last stage normalized ones."""
    from torch import Tensor, nn

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            places = part.places(tokens, None)
            if part.first:
                x = part.embed_tokens(x)
            for block in part.layers.values():
                x = block(x, places)
            return part.norm(x) if part.last else x

    return Stage()


def _updater(part: Any) -> Any:
    """Float32 masters, clipping by the norm over all stages, AdamW."""
    import torch
    import torch.distributed as dist

    weights = list(part.parameters())
    masters = [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=_llama.LEARNING_RATE, fused=True)

    @torch.no_grad()
    def update() -> None:
        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        gradients = [master.grad for master in masters if master.grad is not None]
        square = torch.stack(torch._foreach_norm(gradients)).square().sum()
        dist.all_reduce(square)
        scale = (CLIP / (square.sqrt() + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
        optimizer.step()
        torch._foreach_copy_(weights, masters)

    return update
