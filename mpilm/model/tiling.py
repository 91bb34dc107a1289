"""How attention of short sequences is cut into tiles: arithmetic only, no torch. `attention.py` says why."""

from __future__ import annotations

BLOCK = 128             # tokens a block has at least
LONGEST = 1024          # from here on the probabilities are too much memory to keep
MOST_BLOCKS = 4         # every band adds code to compile


def num_blocks(length: int) -> int:
    """Blocks that a sequence of `length` tokens is cut into; 0: PyTorch's own kernel is used."""
    if length > LONGEST:
        return 0
    blocks = 1
    while blocks < MOST_BLOCKS and length % (2 * blocks) == 0 and length // (2 * blocks) >= BLOCK:
        blocks *= 2
    return blocks
