"""Codes for gradients: how fast a rank makes them, beside a copy of the same memory.

    mpirun -np 2 python -m mpilm.bench compress

Values are GB/s of float32 gradient on each rank, all at once and with one thread each, of the slowest; medians over
interleaved rounds. "encode with feedback" is what a step does: residuals are added, and what the code loses is kept.
"bytes a value" is what goes over the wire, of 4.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from mpi4py import MPI

from mpilm.bench.measure import interleaved
from mpilm.comm import arrays
from mpilm.sync import compress
from mpilm.sync.compress import Codec

OURS = tuple(name for name in compress.names() if name != "none")
ROUNDS = 9

Emit = Callable[[str, str, float, str], None]


def run(comm: MPI.Comm, emit: Emit, *, mib: int) -> None:
    """Measure. Collective over `comm`.

    Args:
        emit: Gets (case, who, value, unit).
        mib: Size of the gradient.
    """
    torch.set_num_threads(1)
    values = torch.randn(mib * 2**18, generator=torch.Generator().manual_seed(comm.rank))
    target = torch.zeros_like(values)
    codecs = {name: way() for name in OURS if issubclass(way := compress.get(name), Codec)}
    data = {name: arrays.zeros(codec.size(values.numel()), np.uint8) for name, codec in codecs.items()}
    encode = {name: _encode(codec, values, data[name]) for name, codec in codecs.items()}
    feedback = {name: _with_feedback(codec, values.clone(), data[name]) for name, codec in codecs.items()}
    decode = {name: _decode(codec, data[name], target) for name, codec in codecs.items()}
    for case, contenders in (("encode", encode), ("encode with feedback", feedback), ("decode", decode)):
        seconds = interleaved(comm, {**contenders, "copy": lambda: target.copy_(values)}, rounds=ROUNDS)
        for who, value in seconds.items():
            emit(case, who, values.nbytes / value / 1e9, "GB/s")
    for name, codec in codecs.items():
        emit("size", name, codec.size(values.numel()) / values.numel(), "bytes a value")


def _encode(codec: Codec, gradient: torch.Tensor, data: np.ndarray) -> Callable[[], object]:
    return lambda: codec.encode(gradient, data)


def _with_feedback(codec: Codec, gradient: torch.Tensor, data: np.ndarray) -> Callable[[], object]:
    """As a step does it; what it leaves is the gradient of the next one."""
    lost = torch.zeros_like(gradient)
    return lambda: codec.squeeze(gradient, lost, data)


def _decode(codec: Codec, data: np.ndarray, target: torch.Tensor) -> Callable[[], object]:
    return lambda: codec.decode(data, target)
