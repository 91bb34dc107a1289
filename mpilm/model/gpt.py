"""GPT: a pre-norm decoder whose weights are Hugging Face's Llama's (RMSNorm, rotary positions, SwiGLU, GQA).

    model = GPT(Shape(layers=6, width=384, heads=6, vocab_size=8192))
    model.initialize(seed=1)
    loss = model(inputs, targets)          # mean over B x T, float32 scalar
    logits = model(inputs)                 # B T V

The model is a list of blocks between an embedding and a head, so that a pipeline stage can take a run of them.
It does not own its weights' memory: whoever trains it may point every parameter's `.data` into a flat buffer, of
float32 or bfloat16, before the first call.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpilm.model import init
from mpilm.model.layers import Block, RMSNorm, document_mask, rotary
from mpilm.model.shape import Shape


class GPT(nn.Module):
    """The whole model; parameters in the order and with the names of `shape.parameters()`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, eps=shape.norm_eps)
        self.lm_head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        if shape.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.cos_sin = rotary(0, shape.head_width, shape.rope_theta)

    def forward(self, inputs: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Mean loss (nats a token, float32) or, without targets, logits.

        Args:
            inputs: [B, T] int64 tokens.
            targets: [B, T] int64, the token that follows each input.
            documents: [B, T] integers; attention stays among equal ones. Positions do not restart.
        """
        cos_sin = self.positions(inputs.shape[1])
        mask = None if documents is None else document_mask(documents)
        x = self.embed_tokens(inputs)
        for block in self.layers:
            x = block(x, cos_sin, mask)
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def positions(self, length: int) -> Tensor:
        """[2, T, D] cosines and sines, computed once for the longest sequence seen."""
        if self.cos_sin.shape[1] < length:
            self.cos_sin = rotary(length, self.shape.head_width, self.shape.rope_theta)
        return self.cos_sin[:, :length]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of `shape.tensors()` as a view into the parameter that holds it, in that order."""
        for name, parameter in self.named_parameters():
            parts = self.shape.parts(name)
            rows = [dimensions[0] for dimensions in parts.values()]
            yield from zip(parts, parameter.detach().split(rows), strict=True)

    @torch.no_grad()
    def initialize(self, *, seed: int) -> None:
        """Draw every tensor by its name (`init.draw`)."""
        for name, tensor in self.tensors():
            tensor.copy_(init.draw(name, tuple(tensor.shape), seed=seed, layers=self.shape.layers))
