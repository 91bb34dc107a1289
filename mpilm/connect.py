"""What connects this rank with others, as the configuration has it: whom it shares sequences and layers with, what sums
gradients over its replicas, and in which thread."""

from __future__ import annotations

from collections.abc import Collection

import torch
from mpi4py import MPI

from mpilm import bridge, room
from mpilm.arithmetic import Arithmetic
from mpilm.comm import choose
from mpilm.comm.collectives import Collective
from mpilm.comm.devices import HOST, Device
from mpilm.comm.mesh import Mesh
from mpilm.comm.node import Node
from mpilm.comm.transport import ON_HOST, Transport
from mpilm.comm.worker import Inline, Worker
from mpilm.config import Config
from mpilm.flat import FLOAT_BYTES, bytes_unsummed
from mpilm.launch import World, agree
from mpilm.log import UserError, warn
from mpilm.model.context import WHOLE, Whole
from mpilm.model.memory import Division
from mpilm.model.shape import Shape
from mpilm.model.split import ALONE, Alone
from mpilm.parallel import exchange, layout
from mpilm.parallel.context import Ring
from mpilm.parallel.tensor import Team


def context(mesh: Mesh, transport: Transport = ON_HOST) -> Whole:
    """Whom this rank shares its sequences with; alone it has kernels of its own for them, which keep more and ask less.
    """
    return Ring(mesh.cp, transport) if mesh.cp.size > 1 else WHOLE


def split(config: Config, world: World, mesh: Mesh, shape: Shape, decision: Arithmetic,
          transport: Transport = ON_HOST) -> Alone:
    """Whom this rank shares its layers with. Collective over the mesh."""
    if mesh.tp.size == 1:
        return ALONE
    rows = config.data.micro_batch_size * config.data.sequence_length // mesh.cp.size
    built, problem = [], None
    try:
        built.append(exchange.build(config.sync.collective, mesh.tp, rows=rows, width=shape.width,
                                    dtype=decision.dtype, reproducible=decision.reproducible, transport=transport,
                                    never=_never(mesh, transport)))
    except UserError as error:
        problem = error
    agree(mesh.comm, problem)       # teams may be on different nodes
    return Team(world.owns(built[0]))


def collective(config: Config, world: World, mesh: Mesh, parameters: Collection[torch.nn.Parameter],
               transport: Transport = ON_HOST) -> Collective:
    """What sums gradients over the replicas: picked, if it is to be, by sums as long as a bucket gets. Collective over
    the mesh."""
    node, reproducible = world.owns(Node.build(mesh.replicas)), config.run.reproducible
    slots = max(map(len, layout.slots(config, mesh.dp.size, reproducible=reproducible)))
    unsummed = bytes_unsummed(slots, node.comm.size, element=2,
                              buffers=Division(num_slots=slots, reproducible=reproducible).buffers)
    longest = min(int(config.sync.bucket_mib * 2**20) // FLOAT_BYTES, sum(p.numel() for p in parameters))
    shared = room.shared(mesh, node, parameters, gradient=max(FLOAT_BYTES, unsummed))
    return world.owns(choose.build(config.sync.collective, mesh.replicas, node, count=longest, shared_bytes=shared,
                                   reproducible=reproducible, transport=transport, never=_never(mesh, transport)))


def check(config: Config, mesh: Mesh, transport: Transport) -> None:
    """Whether the collective asked for may be used.

    Raises:
        UserError: Not beside the messages of ranks that share a model.
    """
    if config.sync.collective in _never(mesh, transport):
        raise UserError("--sync.collective nccl: ranks that share a model use the GPU's memory in messages while "
                        "gradients are summed, and the two may wait for each other for ever. Choose --sync.collective "
                        "shared or ring (or auto); with --parallel.pp alone --comm.transport staged does as well.")


def _never(mesh: Mesh, transport: Transport) -> tuple[str, ...]:
    if transport.device is HOST:
        return ()
    within = mesh.cp.size * mesh.tp.size > 1 or (mesh.pp.size > 1 and transport.direct)
    return ("nccl",) if within else ()


def worker(world: World, mesh: Mesh, device: Device = HOST) -> Worker | Inline:
    """Sums run beside the backward pass where MPI may be called from a thread other than the one that started it, and
    from both at once where the backward pass sends messages too."""
    level = "MULTIPLE" if mesh.pp.size * mesh.cp.size * mesh.tp.size > 1 else "SERIALIZED"
    if world.thread_level >= getattr(MPI, f"THREAD_{level}"):
        return Worker("communication", device, lambda: bridge.on_stream(device.torch, device.pointer))
    warn(f"this MPI runs without MPI_THREAD_{level}: gradients are summed after the backward pass, not during it.")
    return Inline()
