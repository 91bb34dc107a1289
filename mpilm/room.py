"""How much memory a run takes, as far as that can be said before it is taken."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from mpi4py import MPI

from mpilm.comm.mesh import Mesh
from mpilm.comm.node import Node
from mpilm.comm.order import BLOCK
from mpilm.launch import World
from mpilm.log import UserError
from mpilm.model import count
from mpilm.model.shape import Shape

FLOAT_BYTES = 4


def check(shape: Shape, world: World, memory: int) -> None:
    """Refuse what cannot fit in whatever layout, rather than be killed for it. Collective over `world.comm`.

    Args:
        memory: Bytes that this rank has of its device.
    """
    least = 4 * FLOAT_BYTES * count.parameters(shape)
    there = world.comm.allreduce(memory)
    if least > there:
        raise UserError(
            f"A model of {count.parameters(shape):,} parameters takes at least {least / 2**30:,.1f} GiB (weights, "
            f"gradients, two states of the optimizer), and all ranks together have {there / 2**30:,.1f} GiB of memory. "
            "Lower --model.width, --model.layers or --model.vocab_size, or use more nodes.")


def shared(mesh: Mesh, node: Node, parameters: Iterable[torch.nn.Parameter], *, gradient: int = FLOAT_BYTES) -> int:
    """What the ranks of a node share at most: gradients of each, of so many bytes an element, and masters, optimizer
    states and weights once, of all the replicas' groups that sit there. Collective over `mesh.comm`."""
    elements = sum(-(-parameter.numel() // BLOCK) * BLOCK for parameter in parameters)
    mine = (node.comm.size * gradient + 4 * FLOAT_BYTES) * elements // node.comm.size
    host = mesh.comm.Split_type(MPI.COMM_TYPE_SHARED)
    everyone: int = mesh.comm.allreduce(host.allreduce(mine), op=MPI.MAX)
    host.Free()
    return everyone
