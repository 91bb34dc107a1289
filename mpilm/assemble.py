"""The only place that wires: configuration -> mesh, model, synchronizer, loader, trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from mpilm import alike, arithmetic, connect, device, menu, resume, room, sync, ulfm
from mpilm.arithmetic import Arithmetic
from mpilm.asked import Asked
from mpilm.checkpoint import Reader
from mpilm.comm.devices import HOST, Device
from mpilm.comm.mesh import Mesh
from mpilm.comm.roles import Roles
from mpilm.comm.transport import ON_HOST, Transport
from mpilm.config import Config
from mpilm.data._files import write_bytes
from mpilm.data.loader import Loader
from mpilm.data.sampler import Sampler
from mpilm.data.scan import scan
from mpilm.data.shards import Dataset
from mpilm.heartbeat import Pulse
from mpilm.launch import World, on_root
from mpilm.log import UserError
from mpilm.metrics import Metrics
from mpilm.model import count, products
from mpilm.model.gpt import GPT
from mpilm.model.shape import Shape
from mpilm.model.slices import Slices
from mpilm.optim import Update
from mpilm.parallel import layout, schedules
from mpilm.parallel.losses import Losses
from mpilm.parallel.pipeline import Pipeline
from mpilm.saver import Elsewhere, Holder, Saver, writer
from mpilm.server import Serving, meets
from mpilm.state import Past, Read, TrainState, owed, start, values
from mpilm.stop import Stop
from mpilm.sync import Synchronizer
from mpilm.sync._clocks import Clocks
from mpilm.sync._compressed import compressed
from mpilm.sync._server import Server
from mpilm.trainer import Trainer
from mpilm.ulfm import Commit
from mpilm.validation import Validation


@dataclass
class Core:
    """This rank's parts of the model and their synchronizer, over a mesh: what a step needs besides its batch."""

    mesh: Mesh
    slots: range
    parts: list[GPT]
    sync: Synchronizer[Any]
    pipeline: Pipeline
    losses: Losses
    update: Update

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Name -> parameter of all parts."""
        return named(self.parts)

    def slices(self, shape: Shape) -> Slices:
        """What of the model's tensors this rank's parameters hold."""
        return Slices(shape, self.mesh.tp.rank, self.mesh.tp.size)


def program(config: Config, world: World, asked: Asked | None = None, past: Past | None = None,
            pulse: Pulse | None = None) -> Trainer | Serving:
    """The whole program, at the step where it goes on: a trainer, or what a server does. Collective over `world.comm`.

    Args:
        asked: Why it may have to end before its end.
        pulse: Of all ranks, those that do not train too.
        past: Of the same job, before ranks died.

    Raises:
        UserError: On every rank, for whatever of the configuration, data or checkpoint can't be used.
    """
    dataset = open_split(config, "train")
    alike.require_dataset(world.comm, config.data.path, dataset.fingerprint)
    shape = shape_of(config, dataset.vocab_size)
    layout.check(config, shape, world.size)
    scan([dataset, open_split(config, "validation")], world.comm, config.run.dir)
    transport = device.transport(config, world)
    room.check(shape, world, device.memory(world, transport.device))
    reader = resume.find(config, world.comm, again=past is not None)
    past = past or Past()
    about_data = {"fingerprint": dataset.fingerprint}
    if reader is not None:
        resume.check(reader, shape=asdict(shape), data=about_data, config=config)
    resume.make_way(config, reader, world.comm)
    decision, peak = arithmetic.decide(config, world, shape, reader.meta["arithmetic"] if reader else past.arithmetic,
                                       transport.device)
    on_root(world.comm, lambda: write_bytes(Path(config.run.dir) / "config.toml", config.to_toml().encode()))
    about = {"shape": asdict(shape), "data": {**about_data, "tokenizer": dataset.tokenizer_hash},
             "config": config.to_dict(), "arithmetic": decision.to_dict(),
             "layout": layout.describe(config, world.size)}
    roles = assign(config, world, transport.device)
    stop = Stop(world.dup("stop"), asked or Asked(config.run))
    pulse = pulse or Pulse(config.run)
    where = pulse.where
    where.scribe = roles.rank(0)
    if roles.serving:
        state = start(reader)
        server, update = serve(config, shape, decision, roles, state, values(Slices(shape), config.run.seed, reader))
        saver = _saver(config, world, roles.side, server, roles.side, Slices(shape), about, reader=reader)
        return Serving(config, state, server, update, saver, stop, where)
    core = build(config, world, shape, decision, roles, transport)
    where.part, where.passes = core.mesh.parts.rank, lambda: core.pipeline.played
    state, due = restore(core, shape, config, reader), owed(reader)
    return Trainer(
        config=config, state=state, update=core.update, pipeline=core.pipeline, sync=core.sync,
        loader=_loader(config, dataset, core.slots), losses=core.losses, validation=_validation(config, core),
        metrics=_metrics(config, core.mesh.comm, step=state.step - (due is not None)), past=past, owed=due,
        mesh=core.mesh, commit=_commit(world, core.mesh, roles), stop=stop, meets=partial(meets, config),
        where=where, heart=pulse.heart,
        saver=Elsewhere() if roles.servers else _saver(
            config, world, roles.side, core.sync, core.mesh.replicas, core.slices(shape), about, reader=reader),
        flops_per_token=count.flops_per_token(shape, config.data.sequence_length),
        peak_flops=core.mesh.comm.allreduce(peak))


def _commit(world: World, mesh: Mesh, roles: Roles) -> Commit:
    """Workers of servers are not all at the same step."""
    return Commit(world.dup("commit", mesh.comm) if ulfm.active() and not roles.servers else None)


def open_split(config: Config, split: str) -> Dataset:
    """A split of the configured data. Every rank opens it by itself."""
    return Dataset.open(config.data.path, split=split)


def shape_of(config: Config, vocab_size: int) -> Shape:
    """The model's shape over data of `vocab_size` tokens.

    Raises:
        UserError: The vocabulary asked for is smaller than that of the data.
    """
    model = config.model
    if 0 < model.vocab_size < vocab_size:
        raise UserError(f"--model.vocab_size {model.vocab_size}: the data has {vocab_size} tokens; 0 takes it.")
    return Shape(layers=model.layers, width=model.width, heads=model.heads, kv_heads=model.kv_heads,
                 hidden=model.hidden, vocab_size=model.vocab_size or vocab_size,
                 tied_embeddings=model.tied_embeddings, rope_theta=model.rope_theta, norm_eps=model.norm_eps)


def assign(config: Config, world: World, device: Device = HOST) -> Roles:
    """Who serves and who works, on which device. Collective over `world.comm`.

    Raises:
        UserError: There is nobody to work.
    """
    layout.require_workers(config, world.size)
    return world.owns(Roles.build(world.comm, servers=layout.num_servers(config), device=device))


def serve(config: Config, shape: Shape, decision: Arithmetic, roles: Roles, state: TrainState,
          read: Read) -> tuple[Server, Update]:
    """A server that has sent everyone its first parameters, and its update. Collective over all ranks of `roles`: the
    others `build` and `restore`."""
    with torch.device("meta"):
        parameters = named([GPT(shape)])
    update = Update(config.optim, config.run.steps, compiled=decision.compile)
    state.resume(update)
    runs = layout.slots(config, roles.workers, reproducible=decision.reproducible)
    clocks = Clocks(roles.workers, staleness=layout.staleness(config), start=state.step, steps=config.run.steps,
                    meets=partial(meets, config), shares=[len(run) for run in runs])
    server = Server(parameters, _matrices(parameters), roles, clocks, rule=config.sync.staleness_rule,
                    compress=compressed(config.sync, update), states=update.STATES, dtype=decision.dtype,
                    bucket_mib=config.sync.bucket_mib, compiled=update.adds)
    server.load(read, update)
    return server, update


def build(config: Config, world: World, shape: Shape, decision: Arithmetic, roles: Roles | None = None,
          transport: Transport = ON_HOST) -> Core:
    """Parts of the model and synchronizer, with memory but without values yet. Collective over those who work.

    Args:
        roles: As `assign` gave them; None: that is done here, and nobody serves.
        transport: Of the device that the model is on.

    Raises:
        UserError: The layout is impossible; the message names those that would work.
    """
    if config.model.kind != "gpt":
        raise UserError(f"--model.kind {config.model.kind}: this version has gpt.")
    layout.check(config, shape, world.size)
    roles = roles or assign(config, world, transport.device)
    parallel = config.parallel
    pp, cp, tp = parallel.pp, parallel.cp, parallel.tp
    mesh = world.owns(Mesh.build(roles.side, dp=roles.workers // (pp * cp * tp), pp=pp, cp=cp, tp=tp))
    runs = layout.slots(config, mesh.dp.size, reproducible=decision.reproducible)
    slots = runs[mesh.dp.rank]
    together = mesh.replicas
    if layout.staleness(config):    # a step is this replica's own
        runs, together = [slots], MPI.COMM_SELF
    connect.check(config, mesh, transport)
    context = connect.context(mesh, transport)
    split = connect.split(config, world, mesh, shape, decision, transport)
    parts = [GPT(shape, units, context, split)
             for units in layout.of_rank(layout.stages(config, shape), mesh.pp.rank, pp)]
    products.use(decision.precision, parts)
    update = Update(config.optim, config.run.steps, compiled=decision.compile and transport.device is HOST)
    divisor = sum(map(len, runs)) * cp
    synchronizer = synchronize(config, world, mesh, named(parts), update, num_slots=len(slots), dtype=decision.dtype,
                               roles=roles, transport=transport)
    for part in parts:
        part.recompute, part.around = parallel.recompute, synchronizer.around
        part.expect(divisor)
    if decision.compile:
        for part in parts:
            part.compile_parts()
    if config.run.graphs:
        for part in parts:
            part.record(config.data.micro_batch_size, config.data.sequence_length, documents=config.data.mask_documents)
    stages = Pipeline(parts, synchronizer, mesh.pp, schedules.get(parallel.schedule),
                      num_slots=divisor, dtype=decision.dtype, transport=transport)
    return Core(mesh, slots, parts, synchronizer, stages, Losses(together, runs, mesh.pp), update)


def synchronize(config: Config, world: World, mesh: Mesh, parameters: dict[str, torch.nn.Parameter], update: Update, *,
                num_slots: int, dtype: torch.dtype, roles: Roles | None = None,
                transport: Transport = ON_HOST) -> Synchronizer[Any]:
    """The configured synchronizer, which takes over the memory of `parameters`. Collective over the mesh."""
    kind = sync.get(config.sync.kind)
    matrices = _matrices(parameters)
    repeated = set(parameters) - matrices if mesh.tp.rank else set()    # vectors are whole on every rank of a team
    by = roles if roles and roles.servers else connect.collective(config, world, mesh, parameters.values(),
                                                                           transport)
    synchronizer: Synchronizer[Any] = kind(
        parameters, matrices, by, mesh.parts, connect.worker(world, mesh, transport.device), update=update,
        compress=compressed(config.sync, update), num_slots=num_slots, dtype=dtype, bucket_mib=config.sync.bucket_mib,
        reproducible=config.run.reproducible, repeated=repeated, **menu.options(kind, config.sync))
    return world.owns(synchronizer)


def _matrices(parameters: dict[str, torch.nn.Parameter]) -> set[str]:
    """Names of those that weight decay applies to."""
    return {name for name, parameter in parameters.items() if parameter.dim() > 1}


def named(parts: list[GPT]) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter of all `parts`, in the order of the forward pass."""
    return {name: parameter for part in parts for name, parameter in part.named_parameters()}


def restore(core: Core, shape: Shape, config: Config, reader: Reader | None) -> TrainState:
    """Give parameters and optimizer their values: initial ones, or a checkpoint's. Collective over the workers."""
    state = start(reader)
    state.resume(core.update)   # first: from some update on replicas that train apart have other values
    core.sync.load(values(core.slices(shape), config.run.seed, reader))
    return state


def _loader(config: Config, dataset: Dataset, slots: range) -> Loader:
    data = config.data
    sampler = Sampler(dataset.num_sequences(data.sequence_length), global_batch_size=data.global_batch_size,
                      seed=config.run.seed)
    return Loader(dataset, sampler, sequence_length=data.sequence_length, micro_batch_size=data.micro_batch_size,
                  slots=slots, mask_documents=data.mask_documents)


def _validation(config: Config, core: Core) -> Validation | None:
    if not config.log.validate_every:
        return None
    return validation(config, core.pipeline, core.mesh.replicas, share=core.mesh.cp.size,
                      averaged=core.sync.averaged)


def validation(config: Config, stages: Pipeline, comm: Any, *, share: int = 1,
               averaged: Callable[[], AbstractContextManager[None]] = nullcontext) -> Validation:
    """The configured validation, over the pipelines that `comm` connects; `share` of them share a sequence."""
    data = config.data
    return Validation(open_split(config, "validation"), stages, comm, sequences=config.log.validation_sequences,
                      sequence_length=data.sequence_length, micro_batch_size=data.micro_batch_size,
                      mask_documents=data.mask_documents, share=share, averaged=averaged)


def _metrics(config: Config, comm: MPI.Comm, *, step: int) -> Metrics:
    metrics = Metrics(Path(config.run.dir), step=step, steps=config.run.steps, tensorboard=config.log.tensorboard)
    on_root(comm, metrics.open)
    return metrics


def _saver(config: Config, world: World, everyone: MPI.Comm, holds: Holder, sharing: MPI.Comm, slices: Slices,
           about: dict[str, Any], *, reader: Reader | None) -> Saver:
    """Of `everyone` who has something to save, those of `sharing` have the same tensors."""
    return Saver(writer(config, world.dup("checkpoint", everyone)), holds, slices, sharing, config.checkpoint,
                 about=about, reader=reader)
