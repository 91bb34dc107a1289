"""Tensors that all ranks must have alike.

    broadcast(comm, tensor, root=0)
"""

from __future__ import annotations

import torch
from mpi4py import MPI
from torch import Tensor

from mpilm.comm import arrays


def broadcast(comm: MPI.Comm, tensor: Tensor, *, root: int) -> None:
    """Give `tensor` of rank `root` to all, in place; same shape and dtype everywhere. Collective over `comm`."""
    flat = tensor.detach().reshape(-1).contiguous()
    octets = flat.view(torch.uint8).numpy()
    for piece in arrays.chunks(0, octets.size, arrays.MESSAGE_BYTES):
        comm.Bcast(octets[piece], root=root)
    tensor.detach().copy_(flat.view(tensor.shape))
