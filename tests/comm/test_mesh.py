"""The process grid: every factorization of the number of ranks."""

from __future__ import annotations

import pytest
from mpi4py import MPI

from mpilm.comm.mesh import Mesh
from mpilm.log import UserError

LAYOUTS = [(dp, pp, tp) for dp in range(1, 5) for pp in range(1, 5) for tp in range(1, 5)]


@pytest.mark.parametrize(("dp", "pp", "tp"), LAYOUTS)
def test_every_layout(comm: MPI.Comm, dp: int, pp: int, tp: int) -> None:
    if dp * pp * tp != comm.size:
        with pytest.raises(UserError, match=f"--parallel.pp {pp} times --parallel.tp {tp}"):
            Mesh.build(comm, dp=dp, pp=pp, tp=tp)
        return
    mesh = Mesh.build(comm, dp=dp, pp=pp, tp=tp)
    assert (mesh.dp.size, mesh.pp.size, mesh.tp.size) == (dp, pp, tp)
    assert (mesh.dp.rank * pp + mesh.pp.rank) * tp + mesh.tp.rank == comm.rank  # tp fastest: neighbours share a node
    mesh.free()
