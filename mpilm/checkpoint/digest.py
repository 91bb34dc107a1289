"""One number for the weights of a checkpoint, whatever the layout that wrote it."""

from __future__ import annotations

import hashlib

from mpilm.checkpoint.reader import Reader

PREFIX = "model."
BLOCK_BYTES = 16 << 20


def parameters(reader: Reader) -> int:
    """Number of elements of all tensors `model.*`."""
    return sum(tensor.size for name, tensor in reader.tensors.items() if name.startswith(PREFIX))


def weights_sha256(reader: Reader) -> str:
    """SHA-256 over the tensors `model.*` in the order of their names: name, shape, dtype, bytes in C order.

    Reads a block at a time; two checkpoints have the same value if and only if their weights have the same bits.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in reader.tensors if name.startswith(PREFIX)):
        tensor = reader.tensors[name]
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype.str}\n".encode())
        block = BLOCK_BYTES // tensor.dtype.itemsize
        for start in range(0, tensor.size, block):
            digest.update(reader.read(name, start, min(block, tensor.size - start)).data)
    return digest.hexdigest()
