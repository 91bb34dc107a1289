"""A process's part of the model for torch's pipeline, and how it is trained: AdamW, clipping by the common norm.

    Llama       of transformers' LlamaForCausalLM, float32 under autocast to bf16, as the peers of `bench train`
    Blocks      of ours: bf16 weights, float32 masters, the head's gradient computed beside its loss
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpilm.bench._contenders import Case, Place, _llama
from mpilm.bench._pipelines.mpilm import configuration
from mpilm.model.gpt import GPT
from mpilm.model.shape import Shape
from mpilm.parallel import layout

CLIP = 1.0


def _shape(case: Case) -> Shape:
    return Shape(layers=case.layers, width=case.width, heads=case.heads, hidden=case.hidden,
                 vocab_size=case.vocab_size)


def _units(case: Case, place: Place) -> range:
    """Of the embedding, the blocks and the head, those of this process; as ours are cut."""
    return layout.stages(configuration(case, place), _shape(case))[place.rank]


def _clip(gradients: list[Tensor]) -> None:
    square = torch.stack(torch._foreach_norm(gradients)).square().sum()
    dist.all_reduce(square)
    torch._foreach_mul_(gradients, (CLIP / (square.sqrt() + 1e-6)).clamp(max=1.0))


class Llama:
    """See the top.

    Attributes:
        module: Tokens or activations in, activations or logits out.
        first, last: Whether it has the embedding, the head.
    """

    def __init__(self, case: Case, place: Place) -> None:
        units = _units(case, place)
        self.case, self.first, self.last = case, 0 in units, case.layers + 1 in units
        self.module: Any = _LlamaStage(_llama.model(case).requires_grad_(), case.layers, units)
        self.parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=_llama.LEARNING_RATE, fused=True)
        if "compile" in place.variants:
            self.module = torch.compile(self.module)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the micro-batch."""
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def precision(self) -> AbstractContextManager[Any]:
        """That of the passes."""
        return _llama.autocast(self.case)

    def update(self) -> None:
        """From the gradients to new weights. Collective."""
        with torch.no_grad():
            _clip([weight.grad for weight in self.parameters if weight.grad is not None])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class _LlamaStage(nn.Module):
    def __init__(self, net: Any, layers: int, units: range) -> None:
        super().__init__()
        self.embed = net.model.embed_tokens if 0 in units else nn.Identity()
        self.layers = nn.ModuleList(net.model.layers[unit - 1] for unit in units if 1 <= unit <= layers)
        self.rotary = net.model.rotary_emb
        self.head = nn.Sequential(net.model.norm, net.lm_head) if layers + 1 in units else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).unsqueeze(0)
        x = self.embed(x)
        turns = self.rotary(x, places)
        for layer in self.layers:
            x = layer(x, position_embeddings=turns, position_ids=places)
        y: Tensor = self.head(x)
        return y


class Blocks:
    """See the top; as Llama."""

    def __init__(self, case: Case, place: Place) -> None:
        self.part = GPT(_shape(case), _units(case, place))
        self.part.initialize(seed=1)
        self.part.to(torch.bfloat16)
        self.first, self.last = self.part.first, self.part.last
        if "eager" not in place.variants:
            self.part.compile_parts()
        self.module = _BlocksStage(self.part, case.sequence_length)
        self.weights: list[Tensor] = list(self.part.parameters())
        self.masters = [weight.detach().float() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=_llama.LEARNING_RATE, fused=True)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean over the micro-batch."""
        mean: Tensor = self.part.lm_head.loss(x, targets)
        return mean

    def precision(self) -> AbstractContextManager[Any]:
        """As Llama."""
        return nullcontext()

    def update(self) -> None:
        """As Llama."""
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
            _clip([master.grad for master in self.masters if master.grad is not None])
            self.optimizer.step()
            torch._foreach_copy_(self.weights, self.masters)


class _BlocksStage(nn.Module):
    def __init__(self, part: GPT, sequence_length: int) -> None:
        super().__init__()
        self.part, self.tokens = part, torch.zeros(1, sequence_length, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        places = self.part.places(self.tokens.expand(len(x), -1), None)
        if self.part.first:
            x = self.part.embed_tokens(x)
        for block in self.part.layers.values():
            x = block(x, places)
        return self.part.norm(x) if self.part.last else x
