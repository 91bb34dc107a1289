"""FSDP2 (fully_shard) over Gloo: a process a rank, weights, gradients and optimizer state in shares.

In cases of bf16 precision is FSDP2's own policy, bf16 parameters with gradients reduced in float32, which is faster
than autocast. The gathered weights are kept from forward to backward: memory is not short here, and it halves what is
sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from mpilm.bench._contenders import Case, Place, Step, _llama

LAYOUT = "peers"
VARIANTS: tuple[str, ...] = ()


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See the package's docstring."""
    with _llama.process_group(place):
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        net = _llama.model(case)
        mesh = init_device_mesh("cpu", (place.size,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if case.precision == "bf16" else None,
                                      reduce_dtype=torch.float32)
        for part in (*net.model.layers, net):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        yield _llama.stepper(net, case, place, lambda _: nullcontext())
