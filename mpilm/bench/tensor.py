"""Layers shared by ranks: ours, PyTorch's tensor parallelism, and data parallel on the same ranks.

    mpirun -np 2 python -m mpilm.bench tensor
    mpirun -np 2 python -m mpilm.bench tensor --case wide --who mpilm-tp,torch-tp --rounds 3

Contenders take turns as those of `bench train` do; `_tensors/__init__.py` says who they are. Values are tokens/s over
all ranks, medians over the rounds; cases "... peak PSS" and "... peak RSS" are MiB of the largest process: its share of
what processes map together, in steps after warming up; and all that it ever mapped.
"""

from __future__ import annotations

from mpi4py import MPI

from mpilm.bench import _tensors
from mpilm.bench._contest import Emit, contest

OURS = tuple(name for name in _tensors.names() if name.startswith("mpilm"))


def run(comm: MPI.Comm, emit: Emit, *, case: str, who: str, rounds: int, steps: int) -> None:
    """Measure; see `contest`. Collective over `comm`."""
    contest(comm, emit, _tensors.who, case=case, who=who, rounds=rounds, steps=steps)
