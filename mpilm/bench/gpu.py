"""What GPUs make of it: collectives beside what bounds them, and training steps beside the chip's limit and peers.

    mpirun -np 2 python -m mpilm.bench gpu --part links
    mpirun -np 1 python -m mpilm.bench gpu --part steps --case 124m,350m,1300m

Ranks may share a GPU here. `jobs/gpu_check.sh` runs all of it and leaves a table.
"""

from __future__ import annotations

from dataclasses import replace

from mpi4py import MPI

from mpilm.bench import _gpu_links, _gpu_peers, _gpu_steps
from mpilm.comm import aware
from mpilm.comm.transport import Direct, Staged, Transport
from mpilm.config import Comm, Config, Run
from mpilm.launch import session
from mpilm.log import UserError

OURS = ("mpilm", "ring (device)", "ring (staged)", "shared ()", "tree (device)", "tree (staged)")


def run(comm: MPI.Comm, emit: _gpu_links.Emit, *, device: str, part: str, case: str, rounds: int, steps: int,
        reproducible: bool, fp8: bool, graphs: bool, peer: bool, nanogpt: str) -> None:
    """Measure. Collective over `comm`.

    Args:
        device: That the session has chosen.
        part: "links" or "steps".
        case: Of _gpu_steps.CASES, with commas between.
        rounds, steps, reproducible, fp8, graphs: As _gpu_steps.run.
        peer, nanogpt: As _gpu_peers.chosen.

    Raises:
        UserError: There is no such case, or no nanoGPT.
    """
    from mpilm import device as devices

    names = case.split(",")
    if unknown := [name for name in names if name not in _gpu_steps.CASES]:
        raise UserError(f"--case {unknown[0]}: there is no such case; there are {', '.join(_gpu_steps.CASES)}.")
    peers = _gpu_peers.chosen(llama=peer, nanogpt=nanogpt)
    with session() as here:
        world = replace(here, device=device)
        config = Config(run=Run(share_gpu=True, reproducible=False), comm=Comm(transport="staged"))
        found = devices.transport(config, world)
        if part == "links":
            _gpu_links.run(comm, emit, _ways(found, comm), rounds=rounds)
            return
        for name in names:
            _gpu_steps.run(world, emit, found, name, rounds=rounds, steps=steps, reproducible=reproducible, fp8=fp8,
                           graphs=graphs, peers=peers)


def _ways(found: Transport, comm: MPI.Comm) -> list[Transport]:
    """Through the host, and if MPI takes it the device's memory itself."""
    direct = comm.size > 1 and aware.answer(found.device, comm).usable
    return [Staged(found.device), *([Direct(found.device)] if direct else [])]
