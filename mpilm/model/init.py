"""Initial weights, drawn per tensor name at full size.

A tensor's values depend on its name, its shape, the seed and the number of layers, on nothing else: not on the layout,
the rank, the thread count or the order of drawing. A rank that holds a slice draws the whole and cuts.

    draw("layers.0.self_attn.q_proj.weight", (384, 384), seed=1, layers=6, tied=False)
"""

from __future__ import annotations

import hashlib
from math import prod, sqrt

import numpy as np
import torch

RESIDUAL = ("o_proj.weight", "down_proj.weight")      # what is added to the residual stream
EMBEDDING_STD, TIED_STD = 0.5, 0.02


def draw(name: str, shape: tuple[int, ...], *, seed: int, layers: int, tied: bool) -> torch.Tensor:
    """Float32 values of the tensor `name`. Norms are ones; matrices are normal with variance 1 / inputs,
    those that end in the residual stream (2 x layers of them) divided by sqrt(2 x layers).

    The embedding begins the residual stream, so it is about as large as what blocks add to that: a small one would be
    drowned, and its gradient be made large by the first norm (arXiv 2312.16903). `tied` to the head it is small, or the
    first logits would be large.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    embedding = TIED_STD if tied else EMBEDDING_STD
    std = embedding if name.endswith("embed_tokens.weight") else 1 / sqrt(shape[-1])
    if name.endswith(RESIDUAL):
        std /= sqrt(2 * layers)
    values = _generator(name, seed).standard_normal(prod(shape), dtype=np.float32)
    values *= np.float32(std)
    return torch.from_numpy(values).view(shape)


def _generator(name: str, seed: int) -> np.random.Generator:
    """Philox is counter-based: its values are the same on every machine, unlike a library's own generator."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
