"""The process grid: every factorization of the number of ranks."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
from mpi4py import MPI

from mpilm.comm.mesh import Mesh
from mpilm.log import UserError

LAYOUTS = [axes for axes in product(range(1, 5), repeat=4) if prod(axes) <= 8]


@pytest.mark.parametrize(("dp", "pp", "cp", "tp"), LAYOUTS)
def test_every_layout(comm: MPI.Comm, dp: int, pp: int, cp: int, tp: int) -> None:
    if dp * pp * cp * tp != comm.size:
        with pytest.raises(UserError, match=f"--parallel.pp {pp} times --parallel.cp {cp} times --parallel.tp {tp}"):
            Mesh.build(comm, dp=dp, pp=pp, cp=cp, tp=tp)
        return
    mesh = Mesh.build(comm, dp=dp, pp=pp, cp=cp, tp=tp)
    assert (mesh.dp.size, mesh.pp.size, mesh.cp.size, mesh.tp.size) == (dp, pp, cp, tp)
    place = ((mesh.dp.rank * pp + mesh.pp.rank) * cp + mesh.cp.rank) * tp + mesh.tp.rank
    assert place == comm.rank  # tp fastest: neighbours share a node
    assert (mesh.replicas.size, mesh.replicas.rank) == (dp * cp, mesh.dp.rank * cp + mesh.cp.rank)
    assert (mesh.parts.size, mesh.parts.rank) == (pp * tp, mesh.pp.rank * tp + mesh.tp.rank)
    mesh.free()
