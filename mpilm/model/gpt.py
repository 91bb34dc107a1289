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

from mpilm.model import init
from mpilm.model.head import Head
from mpilm.model.layers import Block, Places, RMSNorm
from mpilm.model.shape import Shape


class GPT(nn.Module):
    """The whole model; parameters in the order and with the names of `shape.parameters()`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, eps=shape.norm_eps)
        self.lm_head = Head(shape.width, shape.vocab_size)
        if shape.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._places: Places | None = None

    def forward(self, inputs: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Mean loss (nats a token, float32) or, without targets, logits.

        Args:
            inputs: [B, T] int64 tokens.
            targets: [B, T] int64, the token that follows each input.
            documents: [B, T] integers; attention stays among equal ones. Positions do not restart.
        """
        places = self.places(inputs, documents)
        x = self.embed_tokens(inputs)
        for block in self.layers:
            x = block(x, places)
        x = self.norm(x)
        return self.lm_head(x) if targets is None else self.lm_head.loss(x, targets)

    def places(self, inputs: Tensor, documents: Tensor | None) -> Places:
        """Where the tokens of `inputs` [B, T] stand. Without documents it is the same in every step, and kept."""
        length = inputs.shape[1]
        if documents is not None:
            return Places.of(length, documents, self.shape, inputs.device)
        kept = self._places
        if kept is None or kept.rotary.shape[1] != length or kept.rotary.device != inputs.device:
            kept = self._places = Places.of(length, None, self.shape, inputs.device)
        return kept

    def compile_parts(self) -> None:
        """Compile what is worth it, on the first call: one block's code serves all blocks, and gradients of a block
        are there as soon as its own backward pass is done."""
        for block in self.layers:
            block.compile(dynamic=False)
        self.norm.compile(dynamic=False)
        self.lm_head.softmax = torch.compile(self.lm_head.softmax, dynamic=False)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of `shape.tensors()` as a view into the parameter that holds it, in that order."""
        for name, parameter in self.named_parameters():
            parts = self.shape.parts(name)
            rows = [dimensions[0] for dimensions in parts.values()]
            yield from zip(parts, torch.split(parameter.detach(), rows), strict=True)

    @torch.no_grad()
    def initialize(self, *, seed: int) -> None:
        """Draw every tensor by its name (`init.draw`)."""
        for name, tensor in self.tensors():
            tensor.copy_(init.draw(name, tuple(tensor.shape), seed=seed, layers=self.shape.layers))
