"""The process grid: which ranks hold copies of the model (dp), which its stages (pp), which share its layers (tp).

    mesh = Mesh.build(comm, dp=2, pp=1, tp=4)
    mesh.tp        my row: neighbours in rank, so they share a node
    mesh.dp        the ranks with my place in other copies of the model
"""

from __future__ import annotations

from dataclasses import dataclass

from mpi4py import MPI

from mpilm.log import UserError


@dataclass(frozen=True)
class Mesh:
    """Three communicators through this rank, one along each axis; `comm` holds them all."""

    comm: MPI.Cartcomm
    dp: MPI.Comm
    pp: MPI.Comm
    tp: MPI.Comm

    @classmethod
    def build(cls, comm: MPI.Comm, *, dp: int, pp: int, tp: int) -> Mesh:
        """Arrange the ranks of `comm` as (dp, pp, tp), tp fastest. Collective over `comm`.

        Raises:
            UserError: The axes do not make up the number of ranks.
        """
        if dp < 1 or dp * pp * tp != comm.size:
            raise UserError(
                f"--parallel.pp {pp} times --parallel.tp {tp} must divide the number of ranks, {comm.size}"
                f" (with dp {dp} they make up {dp * pp * tp})."
            )
        grid = MPI.Intracomm(comm).Create_cart([dp, pp, tp], periods=[False] * 3, reorder=False)
        axes = [grid.Sub([place == axis for place in range(3)]) for axis in range(3)]
        return cls(grid, *axes)

    def free(self) -> None:
        """Give the communicators back. Collective over `comm`."""
        for comm in (self.dp, self.pp, self.tp, self.comm):
            comm.Free()
