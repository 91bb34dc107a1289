"""Which precision this machine multiplies fastest in: measured, because flags of a CPU say little about its speed.

    speeds = measure(DTYPES)               # {"bf16": 1.1e12, "fp32": 1.6e11} FLOP/s of the calling process's threads
    best(speeds)                           # "bf16"
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mpilm.progress import Work

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FP8 = "fp8"             # bf16, but for the products of linear layers (products.py)
SIZES = (128, 256, 512, 1024)   # the last: large enough for matrix units and many threads
GPU_SIZES = (8192,)     # 2 ms a product in bf16
ROUNDS = 5
WORTH = 1.2             # bf16 must be so much faster to give up the bits of float32
LONGEST_S = 0.02        # what a product must not take, by the speed of a smaller one: that has filled the units


def measure(names: Iterable[str], *, sizes: Sequence[int] = (), rounds: int = ROUNDS,
            device: str = "cpu") -> dict[str, float]:
    """FLOP/s of a square product in each precision: the best of a few interleaved rounds, about 0.1 s each at most.

    A processor without units for bf16 takes seconds for a large product, so sizes grow, and what is too slow for the
    next one keeps the speed it had.

    Args:
        sizes: Of the squares; none: SIZES, or GPU_SIZES.
        device: Where it is measured, a torch device.
    """
    speeds = dict.fromkeys(names, 0.0)
    for size in sizes or (SIZES if device == "cpu" else GPU_SIZES):
        chosen = [name for name, speed in speeds.items() if not speed or 2 * size ** 3 / speed <= LONGEST_S]
        speeds.update(_speeds(chosen, size, rounds, device))
    return speeds


def _speeds(names: Iterable[str], size: int, rounds: int, device: str) -> dict[str, float]:
    # Not ones on a GPU: where few bits flip it runs faster than it will with anybody's weights.
    make = torch.ones if device == "cpu" else torch.randn
    operands = {name: make(size, size, dtype=DTYPES[name], device=device) for name in names}
    seconds = dict.fromkeys(operands, float("inf"))
    for _ in range(rounds):
        for name, a in operands.items():
            seconds[name] = min(seconds[name], _time(a))
            Work.done += 1  # seconds each, where a busy machine has no units for one of them
    return {name: 2 * size ** 3 / taken for name, taken in seconds.items()}


def carrier(name: str) -> str:
    """The precision of weights and activations, one of DTYPES: fp8's are bf16."""
    return "bf16" if name == FP8 else name


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
