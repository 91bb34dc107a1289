"""GPT: a pre-norm decoder whose weights are Hugging Face's Llama's (RMSNorm, rotary positions, SwiGLU, GQA).

    model = GPT(Shape(layers=6, width=384, heads=6, vocab_size=8192))
    model.initialize(seed=1)
    loss = model(inputs, targets)          # mean over B x T, float32 scalar
    logits = model(inputs)                 # B T V

The model is a row of units: the embedding, the blocks, and last the head with its norm. A pipeline stage is a run of
them, `GPT(shape, units=range(0, 4))`: embedding and three blocks, under the names they have in the whole model.

It does not own its weights' memory: whoever trains it may point every parameter's `.data` into a flat buffer, of
float32 or bfloat16, before the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.model import graphs, init, recompute
from mpilm.model.context import WHOLE, Whole
from mpilm.model.graphs import Played
from mpilm.model.head import Head
from mpilm.model.layers import Block, Embedding, Places, RMSNorm
from mpilm.model.shape import Shape
from mpilm.model.slices import Slices
from mpilm.model.split import ALONE, Alone


def plainly(module: nn.Module, run: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """run(x, *rest): a module whose weights are always there."""
    return run(x, *rest)


class GPT(nn.Module):
    """The whole model, or a run of its units; parameters in the order and with the names of `shape.parameters()`.

    Args:
        shape: Of the whole model.
        units: Those of this part; None: all.
        context: The ranks that share every sequence. Of T tokens a rank computes with T / context.size.
        split: The ranks that share every layer. Of the tokens of `context` a rank keeps a size-th between matrices.

    Attributes:
        around: Through which every module is called: around(module, run, x, *rest) -> run(x, *rest). Whoever owns the
            weights may replace it, to have them there when they are needed.
    """

    def __init__(self, shape: Shape, units: range | None = None, context: Whole = WHOLE, split: Alone = ALONE) -> None:
        super().__init__()
        self.shape, self.context, self.split = shape, context, split
        self.units = range(shape.units) if units is None else units
        if self.first:
            self.embed_tokens = Embedding(shape.vocab_size, shape.width, split)
        mine = [layer for layer in range(shape.layers) if layer + 1 in self.units]
        self.layers = nn.ModuleDict({str(layer): Block(shape, context, split) for layer in mine})
        if self.last:
            self.norm = RMSNorm(shape.width, eps=shape.norm_eps, split=split)
            self.lm_head = Head(shape.width, shape.vocab_size, split)
            if shape.tied_embeddings:
                self.lm_head.weight = self.embed_tokens.weight
        self.recompute = False      # keep a block's input only, and compute the block again in the backward pass
        self.around = plainly
        self._played: dict[str, Played] = {}    # in place of blocks
        self._places: Places | None = None

    @property
    def first(self) -> bool:
        """It begins with the embedding."""
        return 0 in self.units

    @property
    def last(self) -> bool:
        """It ends with the head."""
        return self.shape.units - 1 in self.units

    def forward(self, inputs: Tensor, targets: Tensor | None = None, documents: Tensor | None = None,
                hidden: Tensor | None = None) -> Tensor:
        """Mean loss (nats a token, float32) or, without targets, logits; of a part without the head, what the next
        part takes as `hidden`, [B, T, C]. Where ranks share the sequence, of this rank's tokens: T / size of the T
        that are given. Where they share the layers, `hidden` is a size-th of these, and logits are my part of V.

        Args:
            inputs: [B, T] int64 tokens.
            targets: [B, T] int64, the token that follows each input.
            documents: [B, T] integers; attention stays among equal ones. Positions do not restart.
            hidden: [B, T, C] from the part before; None for the part that begins with the embedding.
        """
        places = self.places(inputs, documents)
        inputs = self.context.share(inputs)
        x = self.around(self.embed_tokens, self.embed_tokens, inputs) if hidden is None else hidden
        for name, block in self.layers.items():
            run = partial(recompute.again, block) if self.recompute else self._played.get(name, block)
            x = self.around(block, run, x, places)
        if not self.last:
            return x
        x = self.around(self.norm, self.norm, x)
        if targets is None:
            return self.around(self.lm_head, self.lm_head, x)
        return self.around(self.lm_head, self.lm_head.loss, x, self.context.share(targets))

    def input_shape(self, stage: int, slot: Sequence[int]) -> tuple[int, ...]:
        """Of what enters pipeline stage `stage`, from 1: that of my tokens of a slot's [B, T], and the width."""
        batch, length = self.rows(slot)
        return batch, length // self.split.size, self.shape.width

    def rows(self, slot: Sequence[int]) -> tuple[int, ...]:
        """[B, T / size] that are mine of a slot's tokens [B, T]."""
        batch, length = slot
        return batch, length // self.context.size

    def linear_rows(self) -> None:
        """No layer sees other rows than those of my tokens of the slot."""
        return

    def places(self, inputs: Tensor, documents: Tensor | None) -> Places:
        """Where my tokens of `inputs` [B, T] stand. Where it is the same in every step, it is kept."""
        length, device, context = inputs.shape[1], inputs.device, self.context
        dtype = next(self.parameters()).dtype
        if documents is not None or context.moves:
            return Places.of(length, documents, self.shape, device, dtype, context)
        kept = self._places
        if kept is None or kept.rotary.shape[1] * context.size != length or kept.rotary.device != device:
            kept = self._places = Places.of(length, None, self.shape, device, dtype, context)
        return kept

    def expect(self, divisor: int) -> None:
        """To be called when weights are on their device: a synchronizer will take the gradients, which may be sparse,
        and the loss will be divided by `divisor` before its backward pass."""
        if self.last:
            self.lm_head.divisor = divisor
        if self.first:      # a GPU would add the rows of a token in any order; a tied head's gradient is not sparse
            table = self.embed_tokens.weight
            self.embed_tokens.sparse = table.device.type == "cpu" and not self.shape.tied_embeddings

    def compile_parts(self) -> None:
        """Compile what is worth it, on the first call: one block's code serves all blocks, and gradients of a block
        are there as soon as its own backward pass is done."""
        self.context.compiled()
        for block in self.layers.values():
            block.compile(dynamic=False)
        if self.last:
            self.norm.compile(dynamic=False)
            self.lm_head.softmax.compile()

    def record(self, batch: int, length: int, *, documents: bool) -> None:
        """Have blocks played as CUDA graphs (`graphs`) for slots of [batch, length] tokens: once weights are in their
        place, on a GPU, and after `compile_parts`.

        Args:
            documents: Slots come with documents.
        """
        one = next(self.parameters())
        tokens = torch.zeros(batch, length, dtype=torch.int64, device=one.device)
        hidden = torch.zeros(batch, length, self.shape.width, dtype=one.dtype, device=one.device)
        played = graphs.record(list(self.layers.values()), hidden, self.places(tokens, tokens if documents else None))
        self._played = dict(zip(self.layers, played, strict=True))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of `shape.tensors()` as a view into the parameter that holds it whole, in that order."""
        for name, parameter in self.named_parameters():
            parts = self.shape.parts(name)
            rows = [dimensions[0] for dimensions in parts.values()]
            yield from zip(parts, torch.split(parameter.detach(), rows), strict=True)

    @torch.no_grad()
    def initialize(self, *, seed: int) -> None:
        """Draw every tensor by its name (`init.draw`), and keep what is mine of it."""
        slices = Slices(self.shape, self.split.rank, self.split.size)
        for name, parameter in self.named_parameters():
            drawn = [part.cut(init.draw(part.tensor, part.shape, seed=seed, layers=self.shape.layers,
                                        tied=self.shape.tied_embeddings))
                     for part in slices.parts(name)]
            parameter.copy_(torch.cat(drawn).view(parameter.shape))
