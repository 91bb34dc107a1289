"""Memory divided over replicas: ours at every level, ours undivided, and FSDP2 over Gloo.

    mpirun -np 2 python -m mpilm.bench sharded
    mpirun -np 2 python -m mpilm.bench sharded --case wide --who mpilm-allreduce,mpilm-sharded1 --rounds 7

Contenders take turns as those of `bench train` do; `_shardings/__init__.py` says who they are. Values are tokens/s over
all ranks, medians over the rounds; cases "... peak PSS" and "... peak RSS" are MiB of the largest process: its share of
what processes map together, in steps after warming up; and all that it ever mapped.
"""

from __future__ import annotations

from mpi4py import MPI

from mpilm.bench import _shardings
from mpilm.bench._contest import Emit, contest

OURS = tuple(name for name in _shardings.names() if name.startswith("mpilm"))


def run(comm: MPI.Comm, emit: Emit, *, case: str, who: str, rounds: int, steps: int) -> None:
    """Measure; see `contest`. Collective over `comm`."""
    contest(comm, emit, _shardings.who, case=case, who=who, rounds=rounds, steps=steps)
