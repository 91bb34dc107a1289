"""What the checkpoint tests share: tensors, ways to cut them over ranks, a directory with a few checkpoints."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.checkpoint import Piece, Reader, Writer

Tensors = dict[str, np.ndarray]


def tensors(seed: int = 0) -> Tensors:
    """Weights and optimizer state of a small model; every bit pattern is possible, NaN payloads too."""
    rng = np.random.default_rng(seed)

    def bits(*shape: int) -> np.ndarray:
        return rng.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.float32)

    return {"model.embed.weight": bits(61, 8), "model.norm.weight": bits(8), "model.scale": bits(),
            "adam_m.embed.weight": bits(61, 8), "adam_v.embed.weight": bits(61, 8),
            "count": np.arange(5, dtype=np.int64) + seed}


def cut(whole: Tensors, rank: int, size: int, seed: int = 0) -> list[Piece]:
    """This rank's pieces of a random layout, which all ranks draw alike from `seed`."""
    rng = random.Random(seed)
    pieces = []
    for name, array in whole.items():
        flat = array.reshape(-1)
        ends = sorted(rng.randint(0, flat.size) for _ in range(rng.randint(0, 4)))
        for start, stop in zip([0, *ends], [*ends, flat.size], strict=True):
            if rng.randrange(size) == rank:
                pieces.append(Piece(name, array.shape, start, flat[start:stop]))
    return pieces


def write(directory: Path, comm: Any, steps: list[int], *, seed: int = 0, **options: Any) -> None:
    """A checkpoint for each step, with `tensors(step)`, in a random layout."""
    writer = Writer(directory, comm, **{"keep_last": len(steps), **options})
    for step in steps:
        writer.save(step, cut(tensors(step), comm.rank, comm.size, seed + step), {"note": f"step {step}"})
        writer.wait()


def assert_holds(reader: Reader, whole: Tensors) -> None:
    """Every tensor is there, with the same bits."""
    assert set(reader.tensors) == set(whole)
    for name, array in whole.items():
        assert reader.tensors[name].shape == array.shape
        assert reader.tensors[name].dtype == array.dtype
        assert reader.read(name, 0, array.size).tobytes() == array.tobytes(), name
