"""What the peers train and how: transformers' LlamaForCausalLM, AdamW, clipping, as a knowledgeable user would.

Attention is PyTorch's scaled_dot_product_attention; AdamW is the fused one, the fastest that PyTorch offers on a CPU;
gradients are set to None, not zeroed; in cases of bf16 forward is under autocast to it, unless the peer has its own
mixed precision.
The batches are real random tokens, drawn before the clock runs; targets are the inputs shifted by one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import cycle
from typing import Any

from mpilm.bench._contenders import Case, Place, Step

NUM_BATCHES = 8
LEARNING_RATE = 3e-4
CLIP = 1.0


def model(case: Case) -> Any:
    """A LlamaForCausalLM of the case's shape, the same weights on every rank."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": case.vocab_size, "hidden_size": case.width, "intermediate_size": case.hidden,
        "num_hidden_layers": case.layers, "num_attention_heads": case.heads, "num_key_value_heads": case.heads,
        "max_position_embeddings": case.sequence_length, "tie_word_embeddings": False,
        "use_cache": False, "attn_implementation": "sdpa"}
    return LlamaForCausalLM(LlamaConfig(**shape))


def autocast(case: Case) -> AbstractContextManager[Any]:
    """Mixed precision as PyTorch's documentation has it, where the case is in bf16."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16")


def stepper(net: Any, case: Case, place: Place, precision: Callable[[Case], AbstractContextManager[Any]]) -> Step:
    """One step of training `net` on this rank's share of the batch."""
    import torch

    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    source = cycle(batches(case, place))

    def step() -> float:
        inputs, targets = next(source)
        optimizer.zero_grad(set_to_none=True)
        with precision(case):
            loss = net(input_ids=inputs, labels=inputs, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def batches(case: Case, place: Place) -> list[tuple[Any, Any]]:
    """Inputs and targets, int64[sequences of this rank, sequence_length] each."""
    import torch

    sequences = case.global_batch_size // place.size
    generator = torch.Generator().manual_seed(place.rank)
    shape = (sequences, case.sequence_length + 1)
    drawn = [torch.randint(case.vocab_size, shape, generator=generator) for _ in range(NUM_BATCHES)]
    return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) for tokens in drawn]


@contextmanager
def torch_of(place: Place) -> Iterator[None]:
    """Torch with as many threads as cores; what transformers warns of at import is not ours to mend."""
    warnings.filterwarnings("ignore", module="transformers")
    import torch

    torch.set_num_threads(len(place.cores))
    yield


@contextmanager
def process_group(place: Place) -> Iterator[None]:
    """The peers' processes meet over Gloo on the loopback device."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch.distributed as dist

    with torch_of(place):
        dist.init_process_group("gloo", init_method=f"file://{place.rendezvous}", rank=place.rank,
                                world_size=place.size)
        yield
        dist.destroy_process_group()
