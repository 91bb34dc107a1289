"""A part of a small model, and how much torch keeps of a forward pass through it."""

from __future__ import annotations

import torch

from mpilm.model.context import WHOLE
from mpilm.model.gpt import GPT
from mpilm.model.shape import Shape
from mpilm.model.split import ALONE

DTYPES = {2: torch.bfloat16, 4: torch.float32}
SHAPE = Shape(layers=2, width=64, heads=8, kv_heads=4, hidden=192, vocab_size=96)


def kept(part, work):
    """Bytes of what torch keeps for the backward pass through `part`, weights and positions left out."""
    tokens = torch.zeros(work.sequences, work.length, dtype=torch.int64)
    mine = (*part.rows(tokens.shape), part.shape.width)
    hidden = torch.randn(mine[0], mine[1] // work.tp, mine[2], dtype=DTYPES[work.element]).requires_grad_()
    places = part.places(tokens, None)
    known = {tensor.untyped_storage().data_ptr()
             for tensor in (*part.parameters(), tokens, places.rotary, *places.masks)}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage       # held, so that its place is not another's
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        part(tokens, tokens if part.last else None, tokens if work.documents else None, hidden)
    return sum(storage.nbytes() for storage in found.values())


def part_of(units, work, context=WHOLE, split=ALONE):
    """These units of `SHAPE`, not the first, with weights."""
    part = GPT(SHAPE, units, context, split)
    part.initialize(seed=1)
    return part.to(DTYPES[work.element])
