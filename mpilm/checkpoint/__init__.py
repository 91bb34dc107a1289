"""Checkpoints that any layout writes and any layout reads.

    checkpoints/step-00000100/manifest.json                     what there is, where it lies, checksums
    checkpoints/step-00000100/rank-00000-part-00.safetensors    what rank 0 wrote; any safetensors reader opens it
    checkpoints/.step-00000200.partial/                         still being written, or left by a killed job

A checkpoint holds *logical* tensors: a name and a shape. Each rank hands over the pieces it owns (runs of a tensor that
is flattened in C order), together every element once, and reads back whichever runs it needs; no number of ranks,
stages or shards is part of what is stored. Invariants:

1. A directory `step-*` is complete: everything in it was on disk before it got this name.
2. Nothing is removed before its successor is complete.
3. What is read is what was written, bit by bit, or the reader says which file is wrong.
4. Nothing is unpickled, and no size found in a file is believed before it is compared with the file's own.

    writer = Writer("runs/demo/checkpoints", comm, keep_last=2, keep_every=1000)
    writer.reserve(pieces)                     # memory for snapshots, before the first step
    writer.save(100, pieces, {"seed": 1})      # copies the pieces and returns; a thread writes them
    writer.poll()                              # every step
    writer.wait()                              # before the end

    reader = newest("runs/demo/checkpoints", comm)
    reader.read("model.embed.weight", start, count)
"""

from mpilm.checkpoint.differences import differences
from mpilm.checkpoint.digest import parameters, weights_sha256
from mpilm.checkpoint.manifest import DamagedError
from mpilm.checkpoint.newest import Alone, newest, verified
from mpilm.checkpoint.pieces import Piece
from mpilm.checkpoint.reader import Reader
from mpilm.checkpoint.writer import Saved, Writer

__all__ = ["Alone", "DamagedError", "Piece", "Reader", "Saved", "Writer", "differences", "newest", "parameters",
           "verified", "weights_sha256"]
