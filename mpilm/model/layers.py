"""The pieces of a decoder: norm, rotary positions, attention, feed-forward, block, loss.

One code for eager and compiled, for bf16 and fp32: matrix products run in the dtype of the weights, sums that lose
bits (norms, softmax, loss) in float32. Weights are plain leaf tensors that somebody else may own.

B sequences, T tokens, C width, H heads, K kv_heads, D head_width, F hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpilm.model.shape import Shape


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.float()).to(self.weight.dtype)


def rotary(length: int, head_width: int, theta: float) -> Tensor:
    """[2, T, D] float32: cosine and sine of every position's angles, each angle twice (halves, as Llama has them)."""
    frequency = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequency).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [B, T, H, D] turned by its position: pairs are (x[i], x[i + D/2])."""
    cos, sin = cos_sin[:, :, None, :]
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention; `qkv_proj` holds the rows of queries, keys and values."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.head_width = shape.head_width
        self.qkv_proj = _linear(shape.width, shape.width + 2 * shape.kv_width)
        self.o_proj = _linear(shape.width, shape.width)

    def forward(self, x: Tensor, cos_sin: Tensor, mask: Tensor | None) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_width))                # B T H+2K D
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos_sin), rotate(k, cos_sin), v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.kv_heads != self.heads)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); `gate_up_proj` holds the rows of both."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up_proj = _linear(shape.width, 2 * shape.hidden)
        self.down_proj = _linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).float().chunk(2, dim=-1)
        return self.down_proj((F.silu(gate) * up).to(x.dtype))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). x [B, T, C]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.width, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.width, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos_sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


def document_mask(documents: Tensor) -> Tensor:
    """[B, 1, T, T] bool from [B, T] document numbers: a token sees itself and what precedes it in its document."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (causal & (documents[:, :, None] == documents[:, None, :]))[:, None]


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)
