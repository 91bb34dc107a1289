"""DTensor's tensor parallelism over Gloo: parallelize_module of transformers' Llama, a process a rank.

The plan is the one of PyTorch's tutorial and of torchtitan: queries, keys, values, gate and up by columns, what follows
them by rows, norms and residuals by tokens (sequence parallel), the vocabulary of embedding, head and loss over the
ranks. Parameters are float32 under autocast to bf16, as those of the other peers; all ranks see the whole batch.

torch.compile does not take norms and residuals by tokens. So "compile" goes without: every rank has them whole, and
their parameters are plain tensors beside the divided ones, which clipping and the optimizer must be told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from mpilm.bench._contenders import Case, Place, Step, _llama

LAYOUT = "peers"
VARIANTS: tuple[str, ...] = ()


@contextmanager
def contender(case: Case, place: Place) -> Iterator[Step]:
    """See `_contenders`."""
    with _llama.process_group(place):
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import parallelize_module

        net = _llama.model(case)
        compiled = "compile" in place.variants
        parallelize_module(net, init_device_mesh("cpu", (place.size,)), _plan(case, by_tokens=not compiled))
        yield _stepper(torch.compile(net) if compiled else net, case, place, alone=compiled)


def _plan(case: Case, *, by_tokens: bool) -> dict[str, Any]:
    """Module -> how it is divided; between linear layers by tokens, or not."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    between = Shard(1) if by_tokens else Replicate()
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    block = {**{name: ColwiseParallel() for name in columns},
             **{name: RowwiseParallel(output_layouts=between) for name in rows},
             **(_norms_by_tokens() if by_tokens else {})}
    norm = "input_layernorm"
    return {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
            "lm_head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
            **({"model.norm": block[norm]} if norm in block else {}),
            **{f"model.layers.{layer}.{name}": how for layer in range(case.layers) for name, how in block.items()}}


def _norms_by_tokens() -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import PrepareModuleInput, SequenceParallel

    tokens, whole = Shard(1), Replicate()
    return {"input_layernorm": SequenceParallel(), "post_attention_layernorm": SequenceParallel(),
            "self_attn": PrepareModuleInput(input_kwarg_layouts={"hidden_states": tokens},
                                            desired_input_kwarg_layouts={"hidden_states": whole}),
            "mlp": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(whole,))}


def _stepper(net: Any, case: Case, place: Place, *, alone: bool) -> Step:
    """As _llama.stepper, with the whole batch on every rank and a loss over logits that are divided.

    Args:
        alone: Some parameters are plain tensors, the same on every rank.
    """
    import torch
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import loss_parallel

    parameters = list(net.parameters())
    split = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    plain = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    groups = [{"params": group} for group in (split, plain) if group]
    optimizer = torch.optim.AdamW(groups, lr=_llama.LEARNING_RATE, fused=True)
    source = cycle(_llama.batches(case, Place(0, 1, place.cores, place.rendezvous, place.variants)))
    # The model would count the tokens that it has between its layers, which may be this rank's.
    positions = torch.arange(case.sequence_length).unsqueeze(0)

    def step() -> float:
        inputs, targets = next(source)
        optimizer.zero_grad(set_to_none=True)
        with loss_parallel():
            with _llama.autocast(case):
                logits = net(input_ids=inputs, position_ids=positions).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            loss.backward()
        if alone:
            _clip(split, plain)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, _llama.CLIP)
        optimizer.step()
        whole: Any = loss.detach()
        return float(whole.full_tensor())

    return step


def _clip(split: list[Any], plain: list[Any]) -> None:
    """What clip_grad_norm_ does, for gradients of which some are divided over the ranks and some are whole."""
    import torch
    import torch.distributed as dist

    shares, wholes = [weight.grad.to_local() for weight in split], [weight.grad for weight in plain]
    square = torch.stack(torch._foreach_norm(shares)).square().sum()
    dist.all_reduce(square)
    norm = (square + torch.stack(torch._foreach_norm(wholes)).square().sum()).sqrt()
    torch._foreach_mul_([*shares, *wholes], (_llama.CLIP / (norm + 1e-6)).clamp(max=1.0))
