"""A list of layers over many ranks: the wiring and the loop behind `hybrid.model`.

    step       (seed, step) -> ids of examples -> my slots -> pipeline -> sync        the path of `mpilm.train`
    predict    examples in order, micro-batches dealt to the replicas, outputs told to all
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpilm import arithmetic, assemble, optim, options
from mpilm.comm import order
from mpilm.comm.mesh import Mesh
from mpilm.config import Config
from mpilm.data.loader import Batch
from mpilm.data.sampler import Sampler
from mpilm.launch import World
from mpilm.log import UserError
from mpilm.model import precision
from mpilm.optim import Update
from mpilm.parallel import deal, layout, schedules, trial
from mpilm.parallel.layers import Layers
from mpilm.parallel.losses import Losses
from mpilm.parallel.pipeline import Pipeline
from mpilm.parallel.share import broadcast, require_alike
from mpilm.sync import Synchronizer
from mpilm.trainer import tell_skip

Loss = Callable[[Tensor, Tensor], Tensor]


def build(layers: nn.Sequential | Sequence[nn.Module], loss: Loss, inputs: Any, targets: Any, config: Config,
          world: World, *, optimizer: str = "adamw") -> Model:
    """See `hybrid.model`. Collective over `world.comm`."""
    options.check(config)
    if config.sync.kind == "parameter_server":
        raise UserError("sync.kind parameter_server: servers hold models of `mpilm.train`; give allreduce or sharded.")
    if config.sync.kind == "sharded" and config.sync.level == 3:
        raise UserError("sync.level 3: layers of your own do not say when they compute, so their weights can't come "
                        "and go; give level 2.")
    if config.run.precision == precision.FP8:
        raise UserError("run.precision fp8: layers of your own multiply as they are made to; give bf16 or fp32.")
    arithmetic.set_threads(config, world)
    named = deal.named(layers)
    data = _arrays(inputs, targets)
    require_alike(world.comm, _signature(named, data), "layers, inputs and targets")
    model = nn.ModuleDict(named).to(_dtype(config))
    for tensor in model.state_dict().values():
        broadcast(world.comm, tensor, root=0)
    return Model(named, loss, data, config, world, optim.get(optimizer)(config.optim, config.run.steps))


def _dtype(config: Config) -> torch.dtype:
    return precision.DTYPES["bf16" if config.run.precision == "bf16" else "fp32"]


def _arrays(inputs: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    arrays = np.asarray(inputs), np.asarray(targets)
    if not len(arrays[0]) == len(arrays[1]) > 0:
        raise UserError(f"{len(arrays[0])} inputs and {len(arrays[1])} targets: give one target for each input.")
    return arrays


def _signature(layers: Mapping[str, nn.Module], data: tuple[np.ndarray, np.ndarray]) -> str:
    """What has to be the same on all ranks, as far as one can tell without comparing values."""
    tensors = {name: (tuple(value.shape), str(value.dtype))
               for name, value in nn.ModuleDict(layers).state_dict().items()}
    kinds = {name: type(layer).__name__ for name, layer in layers.items()}
    return f"{kinds}, {tensors}, {[(array.shape, str(array.dtype)) for array in data]}"


class Model:
    """Layers in training. Collective over all ranks, like every method.

    Attributes:
        steps_done: Updates so far, left-out ones included.
        grad_norm: Global gradient norm of the last step, before clipping.
    """

    def __init__(self, layers: Mapping[str, nn.Module], loss: Loss, data: tuple[np.ndarray, np.ndarray],
                 config: Config, world: World, update: Update) -> None:
        self.config, self.inputs, self.targets, self.update = config, *data, update
        pp, reproducible = config.parallel.pp, config.run.reproducible
        self.dtype = _dtype(config)
        self.size = config.data.micro_batch_size
        deal.check(config, len(layers), world.size)
        self.mesh = world.owns(Mesh.build(world.comm, dp=world.size // pp, pp=pp))
        runs = layout.slots(config, self.mesh.dp.size, reproducible=reproducible)
        self.slots = runs[self.mesh.dp.rank]
        first = _micro_batch(self.inputs, self.size)
        seen = trial.look(list(layers.values()), first.to(self.dtype) if first.is_floating_point() else first)
        self.stages = deal.stages(config, layers, seen, self.dtype)
        self.tensors = [{key: value.shape for key, value in nn.ModuleDict(part).state_dict().items()}
                        for part in deal.parts(layers, self.stages)]
        self.chunks = [Layers(layers, self.stages, stage, loss, seen, dtype=self.dtype,
                              recompute=config.parallel.recompute)
                       for stage in range(self.mesh.pp.rank, len(self.stages), pp)]
        self.sync = self._synchronizer(world)
        self.pipeline = Pipeline(self.chunks, self.sync, self.mesh.pp, schedules.get(config.parallel.schedule),
                                 num_slots=sum(map(len, runs)), dtype=self.dtype)
        self.losses = Losses(self.mesh.dp, runs, self.mesh.pp)
        self.sampler = Sampler(len(self.inputs), global_batch_size=config.data.global_batch_size, seed=config.run.seed)
        self.steps_done = 0
        self.grad_norm = math.nan

    def _synchronizer(self, world: World) -> Synchronizer[Any]:
        """Takes the parameters over with the values that they have."""
        parameters = {name: parameter for chunk in self.chunks for name, parameter in chunk.named_parameters()}
        values = {name: parameter.detach().float().reshape(-1).numpy() for name, parameter in parameters.items()}

        def initial(state: str, name: str, start: int, count: int) -> np.ndarray:
            return values[name][start:start + count] if state == "model" else np.zeros(count, np.float32)

        synchronizer = assemble.synchronize(self.config, world, self.mesh, parameters, self.update,
                                            num_slots=len(self.slots), dtype=self.dtype)
        synchronizer.load(initial)
        return synchronizer

    def step(self) -> float:
        """One update; the mean loss of its global batch before it.

        Raises:
            UserError: The gradient norm was NaN or infinite `run.max_skipped` times in a row.
        """
        ids = self.sampler.ids(self.steps_done).reshape(-1, self.size)[list(self.slots)]
        # What a slot draws at random depends on the seed, the step and the slot.
        first = self.steps_done * (self.config.data.global_batch_size // self.size)
        keys = (first + np.array(self.slots, np.int64)) * 2**20 + self.config.run.seed % 2**20
        mine = self.pipeline.run(Batch(self.inputs[ids], self.targets[ids], keys))
        self.update.begin(self.steps_done)
        self.sync.step(self.update)
        self.grad_norm = self.sync.grad_norm
        self.steps_done += 1
        tell_skip(self.steps_done, self.update, self.grad_norm)
        if self.update.skipped_in_a_row >= self.config.run.max_skipped:
            raise UserError(f"Step {self.steps_done}: the gradient norm was NaN or infinite "
                            f"{self.update.skipped_in_a_row} times in a row. Lower optim.lr {self.config.optim.lr}, or "
                            "look at the data.")
        return self.losses.mean(mine)

    def epoch(self) -> float:
        """Steps until every example was there once more; the mean of their losses."""
        size, examples = self.config.data.global_batch_size, len(self.inputs)
        epochs = self.steps_done * size // examples + 1
        losses = []
        while self.steps_done * size < epochs * examples:
            losses.append(self.step())
        return math.fsum(losses) / len(losses)

    def predict(self, inputs: Any) -> np.ndarray:
        """The model's outputs for `inputs` [examples, ...] in evaluation mode: float32 [examples, ...], on every rank.
        """
        given = np.asarray(inputs)
        padding = -len(given) % self.size      # whole micro-batches: their size enters the bits, their number does not
        ids = np.append(np.arange(len(given)), np.zeros(padding, np.int64)).reshape(-1, self.size)
        runs = order.even_runs(len(ids), self.mesh.dp.size)
        mine = runs[self.mesh.dp.rank]
        with self.sync.averaged():
            made = self.pipeline.predict(Batch(given[ids[mine.start:mine.stop]], None, None))
        shape = self.chunks[-1].seen[-1].shape
        outputs = torch.empty(len(ids), *shape)
        for replica, run in enumerate(runs):
            root = self.mesh.rank_of(dp=replica, pp=self.mesh.pp.size - 1)
            for slot in run:
                if self.mesh.comm.rank == root:
                    outputs[slot].copy_(made[slot - run.start])
                broadcast(self.mesh.comm, outputs[slot], root=root)
        return outputs.flatten(0, 1)[:len(given)].numpy()

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the layers, as nn.Sequential names it, on every rank: `layers.load_state_dict` takes it."""
        with self.sync.averaged():
            return self._state_dict()

    def _state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for stage, tensors in enumerate(self.tensors):
            chunk, owner = divmod(stage, self.mesh.pp.size)
            held = self.chunks[chunk].layers.state_dict() if owner == self.mesh.pp.rank else {}
            dtypes = self.mesh.pp.bcast({name: held[name].dtype for name in tensors} if held else None, root=owner)
            for name, shape in tensors.items():
                state[name] = held[name].clone() if held else torch.empty(shape, dtype=dtypes[name])
                broadcast(self.mesh.pp, state[name], root=owner)
        return state


def _micro_batch(array: np.ndarray, size: int) -> Tensor:
    """The first micro-batch, for what must be known before training."""
    return torch.from_numpy(array[np.arange(size) % len(array)])
