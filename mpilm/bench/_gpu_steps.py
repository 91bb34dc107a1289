"""Training steps on one GPU: ours beside peers' under torch.compile, same shape, same batch, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median

import torch
from mpi4py import MPI

from mpilm import arithmetic, assemble
from mpilm.arithmetic import Arithmetic
from mpilm.bench._contenders import Case, _ours
from mpilm.bench._gpu_peers import ANOTHER_MODEL, Peer, training
from mpilm.comm.devices import HOST
from mpilm.comm.transport import Transport
from mpilm.config import Auto, Config, Run, Sync
from mpilm.launch import World
from mpilm.model import count, precision

Emit = Callable[[str, str, float, str], None]
DATA_SHEET_TFLOPS = {"H100": 989.0, "H200": 989.0}    # bf16, dense
WARMUP = 3


@dataclass(frozen=True)
class Work:
    """A model, and in how many micro-batches a rank does its share of a step."""

    case: Case
    micro_batches: int


CASES = {
    work.case.name: work for work in (
        Work(Case("124m", layers=12, width=768, heads=12, hidden=2048, vocab_size=50304, sequence_length=2048,
                  global_batch_size=32), 2),
        Work(Case("350m", layers=24, width=1024, heads=16, hidden=2816, vocab_size=50304, sequence_length=2048,
                  global_batch_size=32), 4),
        Work(Case("1300m", layers=24, width=2048, heads=16, hidden=5632, vocab_size=50304, sequence_length=2048,
                  global_batch_size=16), 4),
        Work(Case("tiny", layers=1, width=32, heads=2, hidden=64, vocab_size=64, sequence_length=16,
                  global_batch_size=4), 2),
    )
}


def run(world: World, emit: Emit, transport: Transport, name: str, *, rounds: int, steps: int, reproducible: bool,
        fp8: bool, graphs: bool, peers: Mapping[str, Peer]) -> None:
    """Measure one case. Collective over the world.

    Args:
        reproducible: Also measure reproducible mode.
        fp8: Also measure linear layers in fp8, where there are units for it; MFU is that of the same FLOPs and
            the same peak.
        graphs: Also measure blocks that are launched as CUDA graphs; not on a host.
        peers: By name; each is one process, so they take part with one rank only.
    """
    work = CASES[name]
    config = _config(work, world.size, reproducible=False)
    shape = assemble.shape_of(config, work.case.vocab_size)
    decision, peak = arithmetic.decide(config, world, shape, {}, transport.device)
    peak = world.comm.allreduce(peak)
    contenders = {"mpilm": _ours_step(world, transport, work, decision)}
    if reproducible:
        contenders["mpilm-reproducible"] = _ours_step(world, transport, work, replace(decision, reproducible=True))
    if fp8 and world.comm.allreduce(transport.device.fp8, op=MPI.LAND):
        contenders["mpilm-fp8"] = _ours_step(world, transport, work, replace(decision, precision=precision.FP8))
    if graphs and transport.device is not HOST:
        contenders["mpilm-graphs"] = _ours_step(world, transport, work, decision, graphs=True)
    for who, peer in peers.items() if world.size == 1 else ():
        contenders[who] = training(peer, work.case, micro_batches=work.micro_batches, device=transport.device.torch)
    for step in contenders.values():
        for _ in range(WARMUP):
            step()
    seconds: dict[str, list[float]] = {who: [] for who in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for who in (names[(place + turn) % len(names)] for place in range(len(names))):
            seconds[who].append(_timed(world.comm, contenders[who], steps, transport))
    peaks = {"the measured peak": peak} | _data_sheet(world, transport)
    _tell(emit, work.case, count.flops_per_token(shape, work.case.sequence_length), peaks,
          {who: median(seen) for who, seen in seconds.items()})


def _data_sheet(world: World, transport: Transport) -> dict[str, float]:
    """FLOP/s of all GPUs of the run by the data sheet, if it is known. Collective over the world."""
    device = transport.device
    gpus = len(set(world.comm.allgather((world.host, device.uuid))))
    known = [tflops for name, tflops in DATA_SHEET_TFLOPS.items() if name in device.title]
    return {f"{gpus * known[0]:.0f} TFLOP/s": gpus * known[0] * 1e12} if known else {}


def _tell(emit: Emit, case: Case, flops: int, peaks: dict[str, float], seconds: dict[str, float]) -> None:
    """Tokens/s of all ranks, and what share of the limits that is: `peaks`, FLOP/s."""
    emit(case.name, "matmul peak", peaks["the measured peak"] / 1e12, "TFLOP/s")
    for who, value in seconds.items():
        speed = case.tokens / value
        emit(case.name, who, speed, "tokens/s")
        if who in ANOTHER_MODEL:
            continue
        for name, peak in peaks.items():
            emit(case.name, f"{who}, MFU of {name}", 100 * speed * flops / peak, "%")


def _config(work: Work, size: int, *, reproducible: bool, graphs: bool = False) -> Config:
    compiled: Auto = "on" if work.case.name != "tiny" else "off"
    return _ours.configuration(work.case, micro_batches=max(size, work.micro_batches),
                               run=Run(reproducible=reproducible, compile=compiled, threads=1, graphs=graphs),
                               sync=Sync(bucket_mib=64.0))


def _ours_step(world: World, transport: Transport, work: Work, decision: Arithmetic, *,
               graphs: bool = False) -> Callable[[], float]:
    config = _config(work, world.size, reproducible=decision.reproducible, graphs=graphs)
    shape = assemble.shape_of(config, work.case.vocab_size)
    core, batches = _ours.begun(assemble.build(config, world, shape, decision, transport=transport), config, work.case)

    def step() -> float:
        if transport.device.torch != "cpu":
            torch.use_deterministic_algorithms(decision.reproducible)
        return _ours.step(core, batches)
    return step


def _timed(comm: MPI.Comm, step: Callable[[], float], steps: int, transport: Transport) -> float:
    """Seconds of one step, of the slowest rank."""
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    transport.device.settle()
    return float(comm.allreduce((time.perf_counter() - start) / steps, op=MPI.MAX))
