"""A list of layers over many ranks: the wiring and the loop behind `hybrid.model`.

    step       (seed, step) -> ids of examples -> my slots -> pipeline -> sync        the path of `mpilm.train`
    predict    examples in order, micro-batches dealt to the replicas, outputs told to all
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpilm import alike, arithmetic, assemble, optim, options
from mpilm.comm import order
from mpilm.comm.mesh import Mesh
from mpilm.config import Config
from mpilm.data.loader import Batch
from mpilm.data.sampler import Sampler
from mpilm.heartbeat import FOREVER, Pulse
from mpilm.launch import World
from mpilm.log import UserError
from mpilm.model import precision
from mpilm.optim import Update
from mpilm.parallel import deal, given, layout, schedules, trial
from mpilm.parallel.layers import Layers
from mpilm.parallel.losses import Losses
from mpilm.parallel.pipeline import Pipeline
from mpilm.parallel.share import broadcast
from mpilm.sync import Synchronizer
from mpilm.trainer import tell_skip

Loss = Callable[[Tensor, Tensor], Tensor]
ELSEWHERE = "in the program that uses it"
NAP_S = 0.002


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
    given.check(named)
    data = _arrays(inputs, targets)
    alike.require(world.comm, given.fingerprint(named, dict(zip(("inputs", "targets"), data, strict=True)),
                                                optimizer=optimizer, config=config.to_dict()),
                  "layers, arrays or options are not those of rank 0, and every rank must give the same")
    model = nn.ModuleDict(named).to(_dtype(config))
    for tensor in {**model.state_dict(), **dict(model.named_buffers())}.values():
        broadcast(world.comm, tensor, root=0)
    return Model(named, loss, data, config, world, optim.get(optimizer)(config.optim, config.run.steps))


def _dtype(config: Config) -> torch.dtype:
    return precision.DTYPES["bf16" if config.run.precision == "bf16" else "fp32"]


def _arrays(inputs: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    arrays = given.array("inputs", inputs), given.array("targets", targets)
    if not len(arrays[0]) == len(arrays[1]) > 0:
        raise UserError(f"{len(arrays[0])} inputs and {len(arrays[1])} targets: give one target for each input.")
    return arrays


class Model:
    """Layers in training. Collective over all ranks, like every method. A rank that is waited for in vain is told, and
    ends the job, as `run.hang_timeout_s` has it; in between the program may take its time.

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
        first, wanted = (_micro_batch(array, self.size) for array in data)
        seen, output = trial.look(list(layers.values()), first.to(self.dtype) if first.is_floating_point() else first)
        loss_draws = trial.draws(loss, output, wanted.float() if wanted.is_floating_point() else wanted)
        self.stages = deal.stages(config, layers, seen, self.dtype)
        self.tensors = [{key: value.shape for key, value in nn.ModuleDict(part).state_dict().items()}
                        for part in deal.parts(layers, self.stages)]
        self.chunks = [Layers(layers, self.stages, stage, loss, seen, dtype=self.dtype, loss_draws=loss_draws,
                              recompute=config.parallel.recompute)
                       for stage in range(self.mesh.pp.rank, len(self.stages), pp)]
        self.sync = self._synchronizer(world)
        self.pipeline = Pipeline(self.chunks, self.sync, self.mesh.pp, schedules.get(config.parallel.schedule),
                                 num_slots=sum(map(len, runs)), dtype=self.dtype)
        self.losses = Losses(self.mesh.dp, runs, self.mesh.pp)
        self.sampler = Sampler(len(self.inputs), global_batch_size=config.data.global_batch_size, seed=config.run.seed)
        self.steps_done = 0
        self.grad_norm = math.nan
        self.pulse, self.over = Pulse(config.run, keeps=False), False
        self.where = self.pulse.over(world)
        self.where.passes = lambda: self.pipeline.played
        self.where.enter(ELSEWHERE, FOREVER)
        world.owns(self)

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

    @contextmanager
    def _within(self, name: str) -> Iterator[None]:
        """The call of a method, in which ranks may wait for each other."""
        if self.over:
            raise UserError(f"{name} after the end of `with hybrid.model(...)`: call it inside; what it gives stays.")
        self.where.enter(name)
        try:
            yield
        finally:
            self.where.enter(ELSEWHERE, FOREVER)

    def step(self) -> float:
        """One update; the mean loss of its global batch before it.

        Raises:
            UserError: The gradient norm was NaN or infinite `run.max_skipped` times in a row.
        """
        with self._within("step()"):
            return self._step()

    def _step(self) -> float:
        ids = self.sampler.ids(self.steps_done).reshape(-1, self.size)[list(self.slots)]
        # What a slot draws at random depends on the seed, the step and the slot.
        first = self.steps_done * (self.config.data.global_batch_size // self.size)
        keys = (first + np.array(self.slots, np.int64)) * 2**20 + self.config.run.seed % 2**20
        self.where.step = self.steps_done
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
        asked = given.array("inputs", inputs, like=self.inputs)
        with self._within("predict()"):
            return self._predict(asked)

    def _predict(self, asked: np.ndarray) -> np.ndarray:
        alike.require(self.mesh.comm, {"examples": len(asked)}, "predict() got other inputs than on rank 0")
        padding = -len(asked) % self.size      # whole micro-batches: their size enters the bits, their number does not
        ids = np.append(np.arange(len(asked)), np.zeros(padding, np.int64)).reshape(-1, self.size)
        runs = order.even_runs(len(ids), self.mesh.dp.size)
        mine = runs[self.mesh.dp.rank]
        with self.sync.averaged():
            made = self.pipeline.predict(Batch(asked[ids[mine.start:mine.stop]], None, None))
        shape = self.chunks[-1].seen[-1].shape
        outputs = torch.empty(len(ids), *shape)
        for replica, run in enumerate(runs):
            root = self.mesh.rank_of(dp=replica, pp=self.mesh.pp.size - 1)
            for slot in run:
                if self.mesh.comm.rank == root:
                    outputs[slot].copy_(self._as_seen(made[slot - run.start]))
                broadcast(self.mesh.comm, outputs[slot], root=root)
        return outputs.flatten(0, 1)[:len(asked)].numpy()

    def _as_seen(self, output: Tensor) -> Tensor:
        shape = self.chunks[-1].seen[-1].shape
        if tuple(output.shape) != shape:
            raise UserError(f"The model makes {tuple(output.shape)} of a micro-batch in evaluation mode, and made "
                            f"{shape} of it in training mode: `predict` is for models that make the same of both.")
        return output

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the layers, as nn.Sequential names it, on every rank: `layers.load_state_dict` takes it."""
        with self._within("state_dict()"), self.sync.averaged():
            self.mesh.comm.Barrier()    # it is for all ranks on one stage too
            return self._state_dict()

    def wait(self) -> None:
        """Wait until every rank has come to the end."""
        with self._within("the end of `with hybrid.model(...)`"):
            meeting = self.mesh.comm.Ibarrier()
            while not meeting.Test():
                time.sleep(NAP_S)

    def free(self) -> None:
        """Give the layers back, with what this rank has trained of them, as modules that know nothing of this. Local.
        """
        if self.over:
            return
        self.over = True
        self.pulse.close()
        self.pipeline.give_back()
        for hook in self.sync.hooks:
            hook.remove()
        for chunk in self.chunks:
            for _, parameter in chunk.named_parameters():
                parameter.data = parameter.data.clone()

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
