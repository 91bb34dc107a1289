"""Runs of the built-in corpus that differ in how replicas are kept together, and in nothing else.

    "local_sgd-int8"    is a kind, and what is sent, if it is not float32
    with training(configuration("allreduce", SMALL, path, steps=256), comm) as program: ...

Every run is the program of `mpilm.train` in fast mode and float32, one thread a rank; the first eighth of its updates
is sent uncompressed.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpilm import log
from mpilm.config import Checkpoint, Config, Data, Log, Model, Optim, Run, Sync
from mpilm.launch import on_root, session
from mpilm.log import UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpilm.server import Serving
    from mpilm.trainer import Trainer

BASELINE = "allreduce"
EVERY = 32
WAYS = ("bf16", "int8", "topk", "powersgd", "onebit")
LOCAL = {"kind": "local_sgd", "every": EVERY}
OUTER = {**LOCAL, "outer_lr": 0.7, "outer_momentum": 0.9}
KINDS: dict[str, dict[str, Any]] = {
    BASELINE: {}, "sharded": {"kind": "sharded"}, "local_sgd": LOCAL, "server": {"kind": "parameter_server"}}
MORE: dict[str, dict[str, Any]] = {     # uncompressed only
    "diloco": OUTER, "diloco_streamed": {**OUTER, "fragments": 4}, "post_local": {**LOCAL, "local_after": 2 * EVERY},
    "server_s2": {"kind": "parameter_server", "staleness": 2},
    "server_inf": {"kind": "parameter_server", "staleness": "inf"},
    "server_inf_scale": {"kind": "parameter_server", "staleness": "inf", "staleness_rule": "scale"},
    "server_inf_compensate": {"kind": "parameter_server", "staleness": "inf", "staleness_rule": "compensate"}}
SLOW = (BASELINE, *(f"{BASELINE}-{way}" for way in WAYS), "local_sgd", "local_sgd-int8")


@dataclass(frozen=True)
class Size:
    """Of a model and of a step's batch."""

    layers: int
    width: int
    sequence_length: int
    sequences: int


SMALL = Size(layers=2, width=64, sequence_length=64, sequences=12)      # 3 and 4 replicas share it evenly
LARGE = Size(layers=4, width=256, sequence_length=128, sequences=2)     # 7 million parameters, little to compute


def names() -> list[str]:
    """All runs there are. Servers cannot take powersgd's sums."""
    coded = [f"{kind}-{way}" for kind in KINDS for way in WAYS if (kind, way) != ("server", "powersgd")]
    return sorted([*KINDS, *coded, *MORE], key=lambda name: [*KINDS, *MORE].index(name.partition("-")[0]))


def chosen(text: str) -> list[str]:
    """Names with commas between, the baseline first.

    Raises:
        UserError: One of them is unknown.
    """
    given = text.split(",")
    if unknown := [name for name in given if name not in names()]:
        raise UserError(f"--who {unknown[0]}: there is no such run; there are {', '.join(names())}.")
    return [BASELINE, *(name for name in given if name != BASELINE)]


def configuration(name: str, size: Size, data: str, *, steps: int) -> Config:
    """What `mpilm.train` would be told."""
    kind, _, way = name.partition("-")
    sync = Sync(**{**KINDS, **MORE}[kind], collective="ring", compress=way or "none", compress_warmup=steps // 8)
    return Config(run=Run(steps=steps, reproducible=False, precision="fp32", compile="off", threads=1, resume="never"),
                  data=Data(path=data, sequence_length=size.sequence_length, global_batch_size=size.sequences,
                            micro_batch_size=1),
                  model=Model(layers=size.layers, width=size.width),
                  optim=Optim(lr=5e-3, warmup_steps=steps // 8),
                  checkpoint=Checkpoint(every=0), log=Log(every=steps, validate_every=steps, tensorboard=False),
                  sync=sync)


@contextmanager
def training(config: Config, comm: MPI.Comm) -> Iterator[Trainer | Serving]:
    """A run, assembled, with its run directory (`config.run.dir`) for as long as the block takes.

    Collective over `comm`, which is the world.
    """
    from mpilm import assemble

    with tempfile.TemporaryDirectory(prefix="mpilm-bench-") as folder:
        config.run.dir = on_root(comm, lambda: folder)
        with session() as world:
            with _silence(comm.rank):
                program = assemble.program(config, world)
            yield program
            if program.validation is not None:  # it trains
                program.metrics.close()
            comm.Barrier()


@contextmanager
def _silence(rank: int) -> Iterator[None]:
    """What a run has to say at its beginning is not said."""
    log.setup(rank + 1)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setup(rank)


def tokens(config: Config) -> int:
    """Of a step."""
    return config.data.global_batch_size * config.data.sequence_length
