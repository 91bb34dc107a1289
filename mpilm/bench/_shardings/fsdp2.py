"""FSDP2 (fully_shard) over Gloo: a process a rank; weights, gradients and optimizer state in shares.

Precision is FSDP2's own policy, bf16 parameters with gradients reduced in float32. Unless "kept", a block's weights go
after its forward pass and are gathered again for its backward pass. "ours" divides our model, with the blocks compiled
and the head that computes its gradient on the way: the same kernels as ours, so what differs is how memory is divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle
from typing import Any

from mpilm.bench._contenders import Case, Place, Step, _llama

LAYOUT = "peers"
VARIANTS: tuple[str, ...] = ()


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See `_contenders`."""
    with _llama.process_group(place):
        if "ours" in place.variants:
            model = _ours(case)
            _divide(model, list(model.layers.values()), place)
            yield _stepper(model, case, place)
        else:
            net = _llama.model(case)
            _divide(net, list(net.model.layers), place)
            yield _llama.stepper(net, case, place, lambda _: nullcontext())


def _divide(net: Any, blocks: list[Any], place: Place) -> None:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (place.size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (*blocks, net):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward="kept" not in place.variants)


def _ours(case: Case) -> Any:
    from mpilm.model.gpt import GPT
    from mpilm.model.shape import Shape

    model = GPT(Shape(layers=case.layers, width=case.width, heads=case.heads, hidden=case.hidden,
                      vocab_size=case.vocab_size))
    model.initialize(seed=1)
    model.compile_parts()
    return model


def _stepper(model: Any, case: Case, place: Place) -> Step:
    """As _llama.stepper, for our model."""
    import torch

    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=_llama.LEARNING_RATE, fused=True)
    source = cycle(_llama.batches(case, place))

    def step() -> float:
        inputs, targets = next(source)
        optimizer.zero_grad(set_to_none=True)
        loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _llama.CLIP)
        optimizer.step()
        return float(loss.detach())

    return step
