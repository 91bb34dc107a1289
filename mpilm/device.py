"""What this rank computes on, and how its arrays get to MPI: the GPU that `startup` chose, or the host.

Ranks that use one GPU without knowing of each other are the usual mistake of a batch script, and nothing shows it but
the speed. So the devices of a node are compared, and sharing one is for those who ask for it.
"""

from __future__ import annotations

import os

import torch
from mpi4py import MPI

from mpilm import placement
from mpilm.comm import aware, devices
from mpilm.comm.devices import Device
from mpilm.comm.transport import MENU, ON_HOST, Transport
from mpilm.config import Config, Parallel
from mpilm.launch import World, agree
from mpilm.log import UserError, counted, say, warn

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def transport(config: Config, world: World) -> Transport:
    """As configured. Collective over `world.comm`.

    Raises:
        UserError: Some ranks have a GPU and some have none; several have the same one; the options are not for GPUs;
            or MPI can't be given a GPU's memory, and must be.
    """
    kind, _, index = world.device.partition(":")
    _require_alike(world, kind)
    if kind == "cpu":
        if config.run.graphs:
            raise UserError("--run.graphs true: CUDA graphs are for GPUs, and this run has none. Leave it out.")
        if config.run.device == "auto" and torch.cuda.is_available():
            warn("There is a GPU, and without CuPy it is not used: pip install cupy-cuda13x, or the package for your "
                 "version of CUDA or ROCm. With --run.device host this is not said.")
        return ON_HOST
    if config.run.graphs:
        check_graphs(config.parallel)
    _require_threads(world.thread_level)
    device = _agreed(world, kind, int(index))
    torch.cuda.set_device(int(index))
    sharers = _sharers(config, world, device.uuid)
    if sharers > 1:
        torch.cuda.set_per_process_memory_fraction(1 / sharers, int(index))
    if config.run.reproducible:     # attention's backward pass, for one, adds in any order otherwise
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False     # type: ignore[attr-defined]
    way = _way(config, world, device)
    _check_way(config.parallel, way)
    return MENU[way](device)


def _agreed(world: World, kind: str, index: int) -> Device:
    """The device, on all ranks or on none. Collective over `world.comm`."""
    found: list[Device] = []
    problem = None
    try:
        found.append(devices.get(kind)(index))
    except UserError as error:
        problem = error
    agree(world.comm, problem)
    return found[0]


def memory(world: World, device: Device) -> int:
    """Bytes that this rank may take of the memory of its device. Collective over `world.comm`."""
    if device is devices.HOST:
        return world.memory
    uuids, rank = _uuids(world, device.uuid)
    return device.free_bytes() // len(placement.doubled(uuids).get(uuids[rank], [rank]))


def check_graphs(parallel: Parallel) -> None:
    """Whether blocks can be played as CUDA graphs.

    Raises:
        UserError: Names the option that they can't go with.
    """
    for option, needed in {"pp": 1, "cp": 1, "tp": 1, "schedule": "1f1b", "recompute": False}.items():
        given = getattr(parallel, option)
        if given != needed:
            raise UserError(f"--run.graphs true: a CUDA graph is one forward pass of a block and then its backward "
                            f"pass, without messages, which --parallel.{option} {str(given).lower()} does not keep to. "
                            f"Give --parallel.{option} {str(needed).lower()}, or --run.graphs false.")


def _check_way(parallel: Parallel, way: str) -> None:
    """Messages through the host move on when the thread that sends them waits: while backward passes wait in PyTorch's
    thread for those of their team or ring, those to other stages would not, which some of these wait for."""
    if way == "staged" and parallel.pp > 1 and parallel.cp * parallel.tp > 1:
        raise UserError(f"--parallel.pp {parallel.pp} with cp {parallel.cp} and tp {parallel.tp} needs an MPI that is "
                        "given the GPUs' memory (--comm.transport device; the README says how to get one). Without "
                        "one give --parallel.pp 1, or cp and tp 1.")


def _require_threads(level: int) -> None:
    """PyTorch has a thread of its own for the backward passes of a GPU, and messages are sent from there too."""
    if level < MPI.THREAD_SERIALIZED:
        raise UserError("GPUs need an MPI that may be called from more than one thread (MPI_THREAD_SERIALIZED): unset "
                        "MPI4PY_RC_THREAD_LEVEL, take another MPI, or type --run.device host.")


def _require_alike(world: World, kind: str) -> None:
    kinds = world.comm.allgather((kind, world.host))
    without = sorted({host for found, host in kinds if found == "cpu"})
    if without and any(found != "cpu" for found, _ in kinds):
        raise UserError(f"There is no GPU to be used (or no CuPy) on {', '.join(without)}, and one on other hosts: "
                        "give every host some, or type --run.device host.")


def _uuids(world: World, uuid: str) -> tuple[list[str], int]:
    """Of the devices of my node, and my number there. Collective over `world.comm`."""
    node = world.comm.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
    uuids, rank = node.allgather(uuid), node.rank
    node.Free()
    return uuids, rank


def _sharers(config: Config, world: World, uuid: str) -> int:
    """How many ranks have this rank's device. Collective over `world.comm`.

    Raises:
        UserError: More than one, and nobody said so.
    """
    uuids, rank = _uuids(world, uuid)
    several = placement.doubled(uuids)
    problem = None
    if several and not config.run.share_gpu:
        ranks = next(iter(several.values()))
        problem = UserError(
            f"{counted(len(ranks), 'rank')} on {world.host} have one and the same GPU ({next(iter(several))}), and "
            f"{counted(len(set(uuids)), 'GPU')} are used by {counted(len(uuids), 'rank')} there. If the host has more, "
            "let every rank see all of them (srun --gpu-bind=none) or another one each; if not, start as many ranks as "
            "GPUs, or type --run.share_gpu true to share them.")
    agree(world.comm, problem)
    return len(several.get(uuids[rank], [rank]))


def _way(config: Config, world: World, device: Device) -> str:
    """A name of MENU. Collective over `world.comm`."""
    wanted = config.comm.transport
    if wanted == "staged" or (wanted == "auto" and world.size == 1):
        return "staged"
    found = aware.answer(device, world.comm, ask=wanted == "auto")
    if wanted == "device" and not found.usable:
        raise UserError(f"--comm.transport device: {found.why}. The README says how to get an MPI that knows GPUs; "
                        "--comm.transport staged works with any.")
    way = "device" if found.usable else "staged"
    if way == "device":
        require_fixed_segments(os.environ)
    say(f"transport: {way} ({found.why})")
    return way


def require_fixed_segments(environ: os._Environ[str] | dict[str, str]) -> None:
    """Torch's expandable segments can't be opened by other processes, and MPI gets slow or fails on them.

    Raises:
        UserError: They are turned on.
    """
    for name in ALLOCATOR:
        if "expandable_segments:true" in environ.get(name, "").lower().replace(" ", ""):
            raise UserError(f"{name}={environ[name]}: MPI can't be given memory of expandable segments. Unset it, or "
                            "type --comm.transport staged.")
