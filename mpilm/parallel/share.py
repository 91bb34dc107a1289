"""Tensors and descriptions that all ranks must have alike.

    require_alike(comm, "784-256-128-10", "layers")
    broadcast(comm, tensor, root=0)
"""

from __future__ import annotations

import torch
from mpi4py import MPI
from torch import Tensor

from mpilm.comm import arrays
from mpilm.log import UserError


def broadcast(comm: MPI.Comm, tensor: Tensor, *, root: int) -> None:
    """Give `tensor` of rank `root` to all, in place; same shape and dtype everywhere. Collective over `comm`."""
    flat = tensor.detach().reshape(-1).contiguous()
    octets = flat.view(torch.uint8).numpy()
    for piece in arrays.chunks(0, octets.size, arrays.MESSAGE_BYTES):
        comm.Bcast(octets[piece], root=root)
    tensor.detach().copy_(flat.view(tensor.shape))


def require_alike(comm: MPI.Comm, text: str, what: str) -> None:
    """Collective over `comm`.

    Raises:
        UserError: `text` is not the same on all ranks; on all of them.
    """
    everyone = comm.allgather(text)
    different = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
    if different:
        raise UserError(f"The {what} of rank {different[0]} are not those of rank 0: every rank runs the same program "
                        f"and must come to the same. Rank 0 has\n  {everyone[0]}\nand rank {different[0]}\n  "
                        f"{everyone[different[0]]}")
