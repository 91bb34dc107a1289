"""Causal attention of short sequences by plain matrix products, block by block; long ones by PyTorch's own kernel.

PyTorch's CPU kernel spends its time on tiles: at 128 to 512 tokens its backward runs at a fifth of what the batched
matrix products of the same size reach. So the T tokens are cut into n blocks of S tokens, and what attends to what is
a triangle of S x S tiles. Tiles of one diagonal are one batched product:

    query block   3 |  band 3   band 2   band 1   band 0
                  2 |  band 2   band 1   band 0                band d: query blocks d ... n-1
                  1 |  band 1   band 0                                 with key blocks 0 ... n-1-d
                  0 |  band 0
                     ---------------------------------
                       0        1        2        3   key block

Nothing above the diagonal is computed. With tokens stored block by block ([n, N, S, D]) a band's operands are slices
along the first dimension, so nothing is copied either. The probabilities are kept for the backward pass, in the
weights' precision; sums and exponentials are float32.

N = kv_heads x B, R = rows of queries that meet one block of keys: S x (heads / kv_heads).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpilm.model.precision import wide
from mpilm.model.tiling import num_blocks


def masks(length: int, documents: Tensor | None, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """What `attend` adds to the scores: 0 where a token may look, -inf where not.

    Returns one float32 tensor a band, to be broadcast over [blocks of queries, kv_heads, B, groups, S, S]: with
    documents (integers [B, T]) one for every sequence, else the same for all. For PyTorch's kernel: [B, 1, T, T] of
    `dtype`, the queries', which all blocks keep for the backward pass; or nothing where causality says it all.
    """
    blocks = _tiles(length, device)
    order = torch.arange(length, device=device)
    visible = (order[:, None] >= order[None, :])[None]
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    if not blocks:
        return [] if documents is None else [_additive(visible[:, None]).to(dtype)]
    tiles = _additive(visible).unflatten(2, (blocks, -1)).unflatten(1, (blocks, -1))        # B, n, S, n, S
    bands = [torch.stack([tiles[:, i, :, i - band] for i in range(band, blocks)]) for band in range(blocks)]
    if documents is None:       # all tiles of a band are alike
        bands = [band[:1] for band in bands]
    return [band[:, None, :, None] for band in bands]


def _tiles(length: int, device: torch.device) -> int:
    """Blocks of a sequence; 0 for PyTorch's own kernel, which on a GPU is the faster one at any length."""
    return num_blocks(length) if device.type == "cpu" else 0


def _additive(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor]) -> Tensor:
    """Weighted values [B, T, H, D] of queries [B, T, H, D], divided by sqrt(D), over keys and values [B, T, K, D]."""
    blocks = _tiles(q.shape[1], q.device)
    if not blocks:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[0] if masks else None, scale=1.0,
                                           is_causal=not masks, enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2)
    kv_heads = k.shape[2]
    summed: Tensor = _Bands.apply(*(_to_blocks(x, blocks, kv_heads) for x in (q, k, v)), *masks)
    return _from_blocks(summed, batch=q.shape[0], kv_heads=kv_heads, heads=q.shape[2])


def _to_blocks(x: Tensor, blocks: int, kv_heads: int) -> Tensor:
    """[B, T, heads, D] -> [n, N, R, D]: queries that share a key head become rows of one matrix."""
    batch, length, heads, width = x.shape
    x = x.view(batch, blocks, length // blocks, kv_heads, heads // kv_heads, width)
    return x.permute(1, 3, 0, 4, 2, 5).reshape(blocks, kv_heads * batch, -1, width)


def _from_blocks(y: Tensor, *, batch: int, kv_heads: int, heads: int) -> Tensor:
    """The inverse of `_to_blocks`."""
    blocks, _, _, width = y.shape
    y = y.view(blocks, kv_heads, batch, heads // kv_heads, -1, width).permute(2, 0, 4, 1, 3, 5)
    return y.reshape(batch, -1, heads, width)


class _Bands(torch.autograd.Function):
    """softmax(q k^T + mask) v over the bands; q [n, N, R, D], k and v [n, N, S, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
        blocks = len(masks)
        scores = [_masked(_product(q[band:], k[:blocks - band].mT), mask) for band, mask in enumerate(masks)]
        total = _sum([s.logsumexp(-1, keepdim=True) for s in scores], torch.logaddexp)
        weights = [(s - total[band:]).exp().to(q.dtype) for band, s in enumerate(scores)]
        y = _sum([_product(p, v[:blocks - band]) for band, p in enumerate(weights)], torch.add)
        ctx.save_for_backward(q, k, v, y, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy, = gradients
        q, k, v, y, *weights = ctx.saved_tensors
        blocks = len(weights)
        mean = (wide(dy) * wide(y)).sum(-1, keepdim=True)
        dq, dk, dv = [], [], []
        for band, p in enumerate(weights):
            rows, columns = slice(band, None), slice(0, blocks - band)
            dp = _product(dy[rows], v[columns].mT)
            ds = (wide(p) * (wide(dp) - mean[rows])).to(q.dtype)
            dq.append(_product(ds, k[columns]))
            dk.append(_product(ds.mT, q[rows]))
            dv.append(_product(p.mT, dy[rows]))
        return _sum(dq, torch.add), _sum_keys(dk), _sum_keys(dv), *(None for _ in weights)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched a @ b over the first two dimensions, which lie one after the other in memory."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(*a.shape[:2], a.shape[2], b.shape[3])


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Float32 scores [blocks, N, R, S] with a mask [blocks or 1, 1, B or 1, 1, S, S] added."""
    blocks, _, _, tokens = scores.shape
    split = wide(scores).view(blocks, -1, mask.shape[2], scores.shape[2] // tokens, tokens, tokens)
    return (split + mask).view(scores.shape)


def _sum(bands: list[Tensor], add: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine bands by their query blocks: band d begins at block d."""
    total = bands[0]
    for band, part in enumerate(bands[1:], 1):
        total = torch.cat((total[:band], add(total[band:], part)))
    return total


def _sum_keys(bands: list[Tensor]) -> Tensor:
    """Add bands by their key blocks: band d ends d blocks early."""
    total = bands[0]
    for band, part in enumerate(bands[1:], 1):
        total = torch.cat((total[:-band] + part, total[-band:]))
    return total
