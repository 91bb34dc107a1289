"""Bytes that passes keep and need: arithmetic on the shape, no torch.

    work = Work(sequences=2, length=256)
    activations.kept(shape, range(0, 4), work)         # left by a forward pass until its backward pass
    activations.deferred(shape, range(0, 4), work)     # of these, what weight gradients need that are computed later
    activations.needed(shape, range(0, 4), work)       # besides, while a pass runs

For n tokens: C width, K kv_width, F hidden, V vocabulary, P attention's probabilities; a bytes an element, and w (4)
one of the sums that lose bits. Of `tp` ranks that share the layers each has n / tp tokens between matrices, and a tp-th
of heads, hidden elements and vocabulary; the inputs of the first matrix of a pair are everyone's. A block keeps

    inputs of q k v and of gate and up      2 n C a             weighted values, as made and as o_proj takes them
    queries, and those                      3 n C a / tp        |
    keys and values, probabilities          (2 n K + P) a / tp
    gate, up, and their product             3 n F a / tp
    norms                                   4 n C w / tp        compiled: 2 n C a / tp, and computed again
    roots of mean squares                   2 n w / tp

Long sequences, and those that ranks share, keep the log of a sum instead of probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpilm.model.shape import Shape
from mpilm.model.tiling import num_blocks

FLOAT = 4
CHUNK = 1 << 25     # logits that are there at a time, as in head.py


@dataclass(frozen=True)
class Work:
    """What a rank computes with in one pass.

    Args:
        sequences: Of a micro-batch.
        length: Tokens of a sequence.
        element: Bytes of an element of activations.
        cp: Ranks that share every sequence.
        tp: Ranks that share every layer.
        compiled: By torch.compile, which keeps less of the norms.
        recompute: Only the input of each block is kept.
        documents: Tokens attend within their documents only.
    """

    sequences: int
    length: int
    element: int = 2
    cp: int = 1
    tp: int = 1
    compiled: bool = False
    recompute: bool = False
    documents: bool = False

    @property
    def tokens(self) -> int:
        """Of this rank and those that share the layers with it."""
        return self.sequences * self.length // self.cp

    @property
    def wide(self) -> int:
        """Bytes of an element of the sums that lose bits."""
        return max(self.element, FLOAT)

    def between(self, shape: Shape) -> int:
        """Bytes of what is between matrices, of one rank: n C a / tp."""
        return self.tokens // self.tp * shape.width * self.element


def kept(shape: Shape, units: range, work: Work) -> int:
    """What a forward pass of one micro-batch through `units` leaves until its backward pass."""
    ends = (0 not in units) + (shape.units - 1 not in units)      # what came from a stage and went to the next
    blocks = _num_blocks(shape, units) * (work.between(shape) if work.recompute else block(shape, work))
    masks = _masks(work) if blocks else 0
    return blocks + masks + _head(shape, units, work) + ends * work.between(shape)


def _masks(work: Work) -> int:
    """What PyTorch's own kernel adds to scores, the same for all blocks; others mark tiles and need it no longer."""
    kept = work.documents and work.cp == 1 and not num_blocks(work.length)
    return work.sequences * work.length ** 2 * work.element if kept else 0


def block(shape: Shape, work: Work) -> int:
    """What one block keeps."""
    n, a = work.tokens, work.element
    queries = (3 if work.cp == 1 else 2) * shape.width      # o_proj takes the values as a ring has made them
    split = n * (queries + 2 * shape.kv_width + 3 * shape.hidden + _as_made(shape, work))
    return 2 * n * shape.width * a + (split * a + _weights(shape, work)) // work.tp + 2 * _norm(shape, work)


def _as_made(shape: Shape, work: Work) -> int:
    """Elements a token, where values are a part of what the first matrix made: then queries and keys stay there too.
    """
    whole = work.cp == 1 and not work.compiled and work.sequences == 1
    return shape.width + shape.kv_width if whole else 0


def _norm(shape: Shape, work: Work) -> int:
    roots = work.tokens // work.tp * work.wide
    if work.compiled:
        return work.between(shape) + roots
    rounded = shape.width * work.wide * (work.wide != work.element)       # the weight in float32
    return 2 * work.between(shape) * work.wide // work.element + roots + rounded


def _weights(shape: Shape, work: Work) -> int:
    """P a, or n heads w."""
    blocks = num_blocks(work.length) if work.cp == 1 else 0
    if not blocks:
        return work.tokens * shape.heads * work.wide
    return work.sequences * shape.heads * _pairs(work.length, blocks) * work.element


def _pairs(length: int, blocks: int) -> int:
    """Queries and keys of a sequence, each key block with its own and all later query blocks."""
    return (length // blocks) ** 2 * blocks * (blocks + 1) // 2


def _head(shape: Shape, units: range, work: Work) -> int:
    """The last norm, and the gradients that the loss has computed: of the input and of the weight."""
    if shape.units - 1 not in units:
        return 0
    return _norm(shape, work) + work.tokens * shape.width * work.element + _table(shape, work)


def _table(shape: Shape, work: Work) -> int:
    return shape.vocab_size * shape.width // work.tp * work.element


def deferred(shape: Shape, units: range, work: Work) -> int:
    """What weight gradients need that are computed after the rest of the backward pass: x and dy of each layer."""
    n, a = work.tokens, work.element
    whole, split = 4 * n * shape.width, n * (2 * shape.width + 2 * shape.kv_width + 3 * shape.hidden)
    return _num_blocks(shape, units) * (whole + split // work.tp) * a


def needed(shape: Shape, units: range, work: Work) -> int:
    """What a pass through `units` needs at most, besides what is kept: of one block at a time, or of the head."""
    through_block = _through_block(shape, work) if _num_blocks(shape, units) else 0
    return max(through_block, _through_head(shape, work) if shape.units - 1 in units else 0)


def _through_block(shape: Shape, work: Work) -> int:
    """The backward pass of SwiGLU or of attention, in wide elements, and the gradient of the largest matrix."""
    n, w = work.tokens // work.tp, work.wide
    swiglu = n * shape.hidden * (8 * w if w > work.element else 6 * w)
    blocks = num_blocks(work.length) if work.cp == 1 else 0
    band = work.sequences * shape.heads * work.length ** 2 // blocks if blocks else 0       # the widest
    matrix = 2 * shape.hidden * shape.width // work.tp * work.element
    again = block(shape, work) if work.recompute else 0
    return max(swiglu, 3 * band * w // work.tp) + matrix + again


def _through_head(shape: Shape, work: Work) -> int:
    """Logits, their exponentials and gradient, of a chunk of rows, and what chunks add their part of the weight's
    gradient to; or that gradient, scaled."""
    mine = shape.vocab_size // work.tp
    rows = max(1, CHUNK // mine)
    logits = min(work.tokens, rows) * mine
    summed = mine * shape.width * work.wide if work.tokens > rows else 0
    each = 2 * work.element if work.compiled else work.element + 3 * work.wide if work.wide > work.element \
        else 3 * work.wide
    return max(logits * each + summed, _table(shape, work))


def _num_blocks(shape: Shape, units: range) -> int:
    return sum(0 < unit < shape.units - 1 for unit in units)
