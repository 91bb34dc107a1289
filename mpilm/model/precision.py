"""Which precision this machine multiplies fastest in: measured, because flags of a CPU say little about its speed.

    speeds = measure()                     # {"bf16": 1.1e12, "fp32": 1.6e11} FLOP/s of the calling process's threads
    best(speeds)                           # "bf16"
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZE = 1024             # large enough for the matrix units, small enough for 10 ms a product in float32
GPU_SIZE = 8192         # of a GPU; 2 ms a product in bf16
ROUNDS = 5
WORTH = 1.2             # bf16 must be so much faster to give up the bits of float32


def measure(*, size: int = 0, rounds: int = ROUNDS, device: str = "cpu") -> dict[str, float]:
    """FLOP/s of a square product in each precision: the best of a few interleaved rounds, about 0.2 s.

    Args:
        size: 0: SIZE, or GPU_SIZE.
        device: Where it is measured, a torch device.
    """
    size = size or (SIZE if device == "cpu" else GPU_SIZE)
    # Not ones: a GPU that flips few bits runs faster than it will with anybody's weights.
    make = torch.ones if device == "cpu" else torch.randn
    operands = {name: make(size, size, dtype=dtype, device=device) for name, dtype in DTYPES.items()}
    seconds = {name: float("inf") for name in DTYPES}
    for _ in range(rounds):
        for name, a in operands.items():
            seconds[name] = min(seconds[name], _time(a))
    return {name: 2 * size ** 3 / taken for name, taken in seconds.items()}


def best(speeds: Mapping[str, float]) -> str:
    """"bf16" where it is clearly faster, else "fp32"."""
    return "bf16" if speeds["bf16"] > WORTH * speeds["fp32"] else "fp32"


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype of sums that lose bits: float32, or float64 where that is what is computed with."""
    return x if x.dtype == torch.float64 else x.float()


def _time(a: Tensor) -> float:
    _finish(a)
    start = time.perf_counter()
    a @ a
    _finish(a)
    return time.perf_counter() - start


def _finish(a: Tensor) -> None:
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
