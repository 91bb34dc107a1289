"""What the machine computes with: decided once at the start, the same on all ranks, and recorded.

Everything here can change the bits of a run; the number of ranks is not among it. A resumed run
takes what its checkpoint recorded, so "auto" does not decide anew, and says what differs.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from mpilm.comm.devices import HOST, Device
from mpilm.config import Config
from mpilm.launch import World
from mpilm.log import UserError, counted, say, warn
from mpilm.model import count, precision, products
from mpilm.model.shape import Shape

# Compiling takes about half a minute, and saves about a fifth of a step: operations of a run that is long enough,
# on one core with vector units. A fixed number, because what is decided must not depend on the layout.
WORTH_COMPILING_FLOPS = 5e13
COMPILERS = ("g++", "clang++", "c++")
_measured: dict[tuple[str, str, int], float] = {}   # FLOP/s by precision, device and threads


@dataclass(frozen=True)
class Arithmetic:
    """Attributes that enter the bits."""

    precision: str
    compile: bool
    threads: int
    micro_batch_size: int
    reproducible: bool
    cpu: str
    torch_version: str

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return precision.DTYPES[precision.carrier(self.precision)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return asdict(self)


def decide(config: Config, world: World, shape: Shape, recorded: Mapping[str, Any],
           device: Device = HOST) -> tuple[Arithmetic, float]:
    """Settle what is "auto", set torch's threads, and measure the peak. Collective over `world.comm`.

    Args:
        recorded: What the checkpoint says that is resumed from; empty for a new run.
        device: What is computed on.

    Returns:
        The decision and the matmul peak of this rank, FLOP/s.

    Raises:
        UserError: `run.compile on` where a rank has no C++ compiler; `run.precision fp8` where the device or the model
            is not made for it.
    """
    threads = set_threads(config, world)
    given = recorded.get("precision") if config.run.precision == "auto" else config.run.precision
    given = world.comm.bcast(given)
    if given == precision.FP8:
        _require_fp8(config, world, shape, device)
    speeds = _speeds([precision.carrier(given)] if given else precision.DTYPES, device.torch, threads)
    chosen = world.comm.bcast(given or precision.best(speeds))
    decision = Arithmetic(chosen, _compiles(config, world, shape, recorded), threads, config.data.micro_batch_size,
                          config.run.reproducible, cpu_model() if device is HOST else device.title, torch.__version__)
    _warn_of_changes(decision, recorded)
    _warn_of_mixed_machines(decision, world)
    return decision, speeds[precision.carrier(chosen)]


def set_threads(config: Config, world: World) -> int:
    """Settle how many threads this rank computes with, and say so where that is not its share of the cores. Local."""
    threads = config.run.threads or (1 if config.run.reproducible else world.threads)
    torch.set_num_threads(threads)
    if threads != world.threads:
        why = ("as --run.threads says" if config.run.threads else
               "so that the bits do not depend on it: start a rank for each core, or type --run.threads or "
               "--run.reproducible false")
        say(f"each rank computes with {counted(threads, 'thread')} instead of {world.threads}, {why}")
    return threads


def _speeds(names: Iterable[str], device: str, threads: int) -> dict[str, float]:
    """Measured once in a process: a run that goes on after a death does so without."""
    unknown = [name for name in names if (name, device, threads) not in _measured]
    for name, speed in precision.measure(unknown, device=device).items():
        _measured[name, device, threads] = speed
    return {name: _measured[name, device, threads] for name in names}


def _require_fp8(config: Config, world: World, shape: Shape, device: Device) -> None:
    products.check(shape, config.parallel.tp)
    if not world.comm.allreduce(device.fp8, op=MPI.LAND):
        raise UserError("--run.precision fp8: a GPU of this run has no units for it; NVIDIA's have them from compute "
                        "capability 8.9 on. Type --run.precision bf16.")


def _compiles(config: Config, world: World, shape: Shape, recorded: Mapping[str, Any]) -> bool:
    able = world.comm.allreduce(any(shutil.which(name) for name in COMPILERS), op=MPI.LAND)
    if config.run.compile == "on" and not able:
        raise UserError("--run.compile on: torch.compile needs a C++ compiler on every host; install one "
                        f"({', '.join(COMPILERS)}), or --run.compile off.")
    if config.run.compile != "auto":
        return config.run.compile == "on"
    if "compile" in recorded:
        return able and bool(recorded["compile"])
    tokens = config.run.steps * config.data.global_batch_size * config.data.sequence_length
    flops = tokens * count.flops_per_token(shape, config.data.sequence_length)
    return able and flops >= WORTH_COMPILING_FLOPS


def _warn_of_changes(decision: Arithmetic, recorded: Mapping[str, Any]) -> None:
    changed = [f"{key} {recorded[key]} -> {value}" for key, value in decision.to_dict().items()
               if key in recorded and recorded[key] != value]
    if changed and (decision.reproducible or recorded.get("reproducible")):
        warn("From here on the bits may differ from those of an undisturbed run: " + ", ".join(changed))


def _warn_of_mixed_machines(decision: Arithmetic, world: World) -> None:
    kinds = sorted(set(world.comm.allgather((decision.cpu, decision.torch_version, decision.threads))))
    if decision.reproducible and len(kinds) > 1:
        warn("The ranks differ, so the bits depend on which rank computes what: "
             + "; ".join(f"{cpu}, torch {version}, {threads} threads" for cpu, version, threads in kinds))


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    return names[0] if names else platform.processor() or platform.machine()
