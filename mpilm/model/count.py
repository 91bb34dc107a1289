"""How many parameters and operations a model of some shape has. Arithmetic only, no torch.

    count.parameters(shape)                       # all weights
    count.flops_per_token(shape, sequence_length) # of a training step, what MFU is counted with
"""

from __future__ import annotations

from math import prod

from mpilm.model.shape import Shape


def parameters(shape: Shape) -> int:
    """Weights in all; a tied head counts once."""
    return sum(prod(dimensions) for dimensions in shape.parameters().values())


def matrix_parameters(shape: Shape) -> int:
    """Weights that every token is multiplied with: all matrices and the head, not the embedding's look-up."""
    matrices = sum(prod(dimensions) for name, dimensions in shape.parameters().items()
                   if len(dimensions) == 2 and name not in ("embed_tokens.weight", "lm_head.weight"))
    return matrices + shape.vocab_size * shape.width


def attention_flops_per_token(shape: Shape, sequence_length: int) -> int:
    """Forward and backward of scores and weighted values, not discounted for the causal half (as PaLM counts)."""
    return 12 * shape.layers * shape.width * sequence_length


def flops_per_token(shape: Shape, sequence_length: int) -> int:
    """Operations of forward and backward for one token: 6 a matrix parameter, and attention."""
    return 6 * matrix_parameters(shape) + attention_flops_per_token(shape, sequence_length)


def unit_flops_per_token(shape: Shape, sequence_length: int) -> list[int]:
    """`flops_per_token` of every unit: the embedding (a look-up, 0), the blocks, the head."""
    head = 6 * shape.vocab_size * shape.width
    block = (flops_per_token(shape, sequence_length) - head) // shape.layers
    return [0, *[block] * shape.layers, head]


def unit_parameters(shape: Shape) -> list[int]:
    """Weights of every unit; a tied head counts twice, because its gradient is summed twice."""
    table = shape.vocab_size * shape.width
    block = (parameters(shape) - (1 if shape.tied_embeddings else 2) * table - shape.width) // shape.layers
    return [table, *[block] * shape.layers, table + shape.width]
