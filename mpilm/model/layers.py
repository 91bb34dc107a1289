"""The pieces of a decoder: norm, rotary positions, attention, feed-forward, block.

One code for eager and compiled, for bf16 and fp32: matrix products run in the dtype of the weights, sums that lose
bits (norms, softmax, loss) in float32. Weights are plain leaf tensors that somebody else may own.

B sequences, T tokens, C width, H heads, K kv_heads, D head_width, F hidden, V vocabulary; where ranks share the layers
(`split`), H, K, F and V are what a rank has of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpilm.model.context import WHOLE, Whole
from mpilm.model.precision import wide
from mpilm.model.shape import Shape
from mpilm.model.split import ALONE, Alone


class Places(NamedTuple):
    """What attention needs to know of where its tokens stand; the same for all blocks.

    rotary: [2, T, 1, 2, D/2] float32, cosine and signed sine of every position's angles.
    masks: see `Whole.masks`.
    """

    rotary: Tensor
    masks: list[Tensor]

    @classmethod
    def of(cls, length: int, documents: Tensor | None, shape: Shape, device: torch.device, dtype: torch.dtype,
           context: Whole = WHOLE) -> Places:
        """Places of a rank's tokens of a sequence of `length`; `documents` [B, length] or None; activations of `dtype`.
        """
        turns = rotary(context.positions(length, device), shape.head_width, shape.rope_theta)
        return cls(turns, context.masks(length, documents, device, dtype))


def rotary(positions: Tensor, head_width: int, theta: float) -> Tensor:
    """[2, T, 1, 2, D/2] float32: what `rotate` multiplies x, and x with its halves exchanged, with."""
    frequency = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64, device=positions.device) / head_width)
    angles = torch.outer(positions.double(), frequency)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.stack((cos, cos), 1), torch.stack((-sin, sin), 1)))[:, :, None].float()


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """x [B, T, heads, D] turned by its position, in float32: pairs are (x[i], x[i + D/2])."""
    halves = wide(x).view(*x.shape[:-1], 2, x.shape[-1] // 2)
    return (halves * rotary[0] + halves.flip(-2) * rotary[1]).flatten(-2)


class Embedding(nn.Embedding):
    """Tokens [B, T] -> their rows [B, T, C]; of ranks that share the layers, each has those of its tokens.

    `sparse`, off at first, lets its gradient be a sparse tensor of the tokens' rows, not as long as the vocabulary.
    """

    def __init__(self, vocab_size: int, width: int, split: Alone = ALONE) -> None:
        super().__init__(split.of(vocab_size), width)
        self.split = split

    def forward(self, tokens: Tensor) -> Tensor:
        return self.split.embed(tokens, self.weight, sparse=self.sparse)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32."""

    def __init__(self, width: int, *, eps: float, split: Alone = ALONE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.split = eps, split

    def forward(self, x: Tensor) -> Tensor:
        exact = wide(x)
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        y: Tensor = exact * scale * self.split.common(wide(self.weight))
        return y.to(self.weight.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention; `qkv_proj` holds the rows of queries, keys and values."""

    def __init__(self, shape: Shape, context: Whole = WHOLE, split: Alone = ALONE) -> None:
        super().__init__()
        self.context, self.split = context, split
        self.heads = [split.of(heads) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        self.head_width = shape.head_width
        self.qkv_proj = nn.Linear(shape.width, split.of(shape.width + 2 * shape.kv_width), bias=False)
        self.o_proj = nn.Linear(split.of(shape.width), shape.width, bias=False)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        x = self.split.gather(x)
        qkv = self.qkv_proj(x).view(*x.shape[:2], -1, self.head_width)             # B T H+2K D
        q, k, v = qkv.split(self.heads, dim=2)
        q = (rotate(q, places.rotary) * self.head_width ** -0.5).to(x.dtype)
        k = rotate(k, places.rotary).to(x.dtype)
        return self.split.scatter(self.o_proj(self.context.attend(q, k, v, places.masks).flatten(2)))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [..., 2F], in float32; the backward pass computes the sigmoid once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        gate, up = wide(gate), wide(up)
        return (gate * gate.sigmoid() * up).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        dy = wide(gradients[0])
        x, = ctx.saved_tensors
        gate, up = (wide(half) for half in x.chunk(2, dim=-1))
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        return torch.cat(((dy * up * (sigmoid + silu * (1 - sigmoid))).to(x.dtype), (dy * silu).to(x.dtype)), dim=-1)


class FeedForward(nn.Module):
    """SwiGLU network: down(silu(gate(x)) * up(x)); `gate_up_proj` holds the rows of both."""

    def __init__(self, shape: Shape, split: Alone = ALONE) -> None:
        super().__init__()
        self.split = split
        self.gate_up_proj = nn.Linear(shape.width, split.of(2 * shape.hidden), bias=False)
        self.down_proj = nn.Linear(split.of(shape.hidden), shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.split.scatter(self.down_proj(SwiGLU.apply(self.gate_up_proj(self.split.gather(x)))))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). x [B, T, C], or my tokens of that."""

    def __init__(self, shape: Shape, context: Whole = WHOLE, split: Alone = ALONE) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.width, eps=shape.norm_eps, split=split)
        self.self_attn = Attention(shape, context, split)
        self.post_attention_layernorm = RMSNorm(shape.width, eps=shape.norm_eps, split=split)
        self.mlp = FeedForward(shape, split)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), places)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y
