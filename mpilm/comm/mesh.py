"""The process grid: copies of the model (dp), its stages (pp), who shares its sequences (cp) and its layers (tp).

    mesh = Mesh.build(comm, dp=2, pp=1, cp=1, tp=4)
    mesh.tp          my row: neighbours in rank, so they share a node
    mesh.dp          the ranks with my place in other copies of the model
    mesh.replicas    dp and cp together: the ranks that hold the parameters I hold
    mesh.parts       pp and tp together: the ranks that hold the other parameters of the same model
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpilm.log import UserError

AXES = ("dp", "pp", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """Communicators through this rank, along each axis and over pairs of them; `comm` holds them all."""

    comm: MPI.Comm
    dp: MPI.Comm
    pp: MPI.Comm
    cp: MPI.Comm
    tp: MPI.Comm
    replicas: MPI.Comm
    parts: MPI.Comm

    @classmethod
    def build(cls, comm: MPI.Comm, *, dp: int, pp: int = 1, cp: int = 1, tp: int = 1) -> Mesh:
        """Arrange the ranks of `comm` as (dp, pp, cp, tp), tp fastest. Collective over `comm`.

        Raises:
            UserError: The axes do not make up the number of ranks.
        """
        if dp < 1 or dp * pp * cp * tp != comm.size:
            raise UserError(
                f"--parallel.pp {pp} times --parallel.cp {cp} times --parallel.tp {tp} must divide the number of "
                f"ranks, {comm.size} (with dp {dp} they make up {dp * pp * cp * tp})."
            )
        shape = (dp, pp, cp, tp)
        place = [int(index) for index in np.unravel_index(comm.rank, shape)]
        along = [{axis} for axis in AXES] + [{"dp", "cp"}, {"pp", "tp"}]
        colors = [np.ravel_multi_index([0 if axis in kept else index for axis, index in zip(AXES, place, strict=True)],
                                       shape) for kept in along]
        return cls(comm.Dup(), *(comm.Split(int(color), key=comm.rank) for color in colors))

    def rank_of(self, *, dp: int, pp: int, cp: int = 0, tp: int = 0) -> int:
        """The rank in `comm` of a place in the grid."""
        shape = (self.dp.size, self.pp.size, self.cp.size, self.tp.size)
        return int(np.ravel_multi_index((dp, pp, cp, tp), shape))

    def free(self) -> None:
        """Give the communicators back. Collective over `comm`."""
        for comm in (self.dp, self.pp, self.cp, self.tp, self.replicas, self.parts, self.comm):
            comm.Free()
