"""The loop: batch -> pipeline -> sync -> state.

What happens between steps (metrics, validation, checkpoints) never enters the arithmetic of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mpilm.comm.mesh import Mesh
from mpilm.comm.p2p import Traffic
from mpilm.config import Config
from mpilm.data.loader import Loader
from mpilm.heartbeat import Heart, Where
from mpilm.log import UserError, say
from mpilm.metrics import Metrics
from mpilm.optim import Update
from mpilm.parallel import layout
from mpilm.parallel.losses import Losses, SlotLosses
from mpilm.parallel.pipeline import Pipeline
from mpilm.saver import Elsewhere, Saver
from mpilm.state import Owed, Past, TrainState
from mpilm.stop import Stop
from mpilm.sync import Synchronizer
from mpilm.ulfm import Commit
from mpilm.validation import Validation


@dataclass
class Trainer:
    """The assembled program of a rank that trains (see assemble.py). Collective over all that do, like every method.

    Attributes:
        meets: Whether all ranks are at one step after so many.
        where: What this rank is doing, for its heartbeat.
        heart: Who knows of stragglers.
    """

    config: Config
    state: TrainState
    loader: Loader
    pipeline: Pipeline
    sync: Synchronizer[Any]
    update: Update
    losses: Losses
    validation: Validation | None
    metrics: Metrics
    saver: Saver | Elsewhere
    mesh: Mesh
    commit: Commit
    stop: Stop
    meets: Callable[[int], bool]
    where: Where
    flops_per_token: int
    peak_flops: float
    past: Past = field(default_factory=Past)
    owed: Owed | None = None
    loss: float = math.nan
    heart: Heart | None = None
    reason: str | None = None   # why it stops before the end
    seconds: dict[str, float] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)  # tokens/s of every record

    def __post_init__(self) -> None:
        self.first = self.state.step
        self.speeds = [*self.past.speeds]
        self.taken = self.owed
        if self.owed is not None:
            self.loss, self.sync.grad_norm, self.update.lr = self.owed

    def run(self) -> str | None:
        """Train until `run.steps` steps are done, or until something asks for a stop: returns what."""
        with closing(self.metrics), closing(self.loader):
            window = Window(self.sync.done(self.state.step))
            if self.owed is not None:
                self._tell(window)
            while self.state.step < self.config.run.steps:
                self.step()
                if self.state.step == self.first + 1 and math.isfinite(self.past.since):
                    say(f"went on after {time.perf_counter() - self.past.since:.2f} s")
                window.add(self.seconds)
                self._tell(window)
                if self._after_step() is not None:
                    break
            self.stop.meet()    # before anyone looks how the last save is getting on, which makes it complete
            self.saver.after_step(self.state, last=True, sound=True)    # what began at its end is not here yet
            self.saver.wait()
        return self.reason

    def _after_step(self) -> str | None:
        last = self.state.step == self.config.run.steps
        self.where.enter("saving")
        if self.meets(self.state.step):
            self.stop.save_s = self.saver.save_s
            self.reason = self.stop.after_step(last=last)
        self.saver.after_step(self.state, last=last or self.reason is not None, sound=not self.update.skipped_in_a_row)
        return self.reason

    def abandon(self) -> None:
        """End its threads, without asking other ranks: they may be gone. Local."""
        self.sync.abandon()
        self.saver.abandon()
        self.pipeline.drop()
        if self.validation is not None:
            self.validation.loader.close()

    def step(self) -> float:
        """One update; returns the mean loss of the global batch before it, nats per token."""
        self.where.step = self.state.step
        with self._timed("data_s", "reading data"):
            batch = self.loader.batch(self.state.step)
        with self._timed("compute_s", "forward and backward"):
            mine = self.pipeline.run(batch)
        self.where.enter("summing gradients, updating")
        self.update.begin(self.state.step)
        self.sync.step(self.update, partial(self._commit, mine))
        self.seconds.update(self.sync.seconds)
        self._divide()
        self.state = self.settled()
        self.where.step = self.state.step   # what comes between steps belongs to the one that is done
        heed_skips(self.config, self.state.step, self.update, self.sync.grad_norm, workers=self.mesh.replicas.size)
        return self.loss

    def _divide(self) -> None:
        """`run` came back, and a GPU computed on: what the sum waited for that is not communication."""
        launched, computed = self.seconds["compute_s"], self.pipeline.compute_s
        beyond = min(max(0.0, computed - launched), self.seconds["comm_s"])
        self.seconds |= {"compute_s": launched + beyond, "comm_s": self.seconds["comm_s"] - beyond,
                         "bubble_s": self.pipeline.wait_s}
        self.where.computed(self.seconds["compute_s"] - self.pipeline.wait_s)

    def _commit(self, mine: SlotLosses) -> None:
        """From here on the step counts, whoever dies."""
        loss = self.losses.mean(mine)
        self.commit.take()
        self.loss = loss
        self.taken = Owed(loss, self.sync.grad_norm, self.update.lr)    # what the next step begins does not change it

    def settled(self) -> TrainState:
        """Where the run stands; a step that was cut short counts if all had agreed to take it."""
        step = self.first + self.commit.steps
        if step == self.state.step:
            return self.state
        return TrainState.after(step, self.update)

    def _tell(self, window: Window) -> None:
        step = self.state.step
        if not due(self.config, step):
            return
        values = self._values(window)
        if self.validation is not None and validates(self.config, step):
            self.where.enter("evaluating")
            values["validation_loss"] = self.validation.after(step)
        self.metrics.record(values)
        window.restart(self.sync.done(step))

    def _values(self, window: Window) -> dict[str, Any]:
        data, seconds, done = self.config.data, window.means(), self.sync.done(self.state.step)
        tokens = data.global_batch_size * data.sequence_length
        if window.steps:
            self.speeds.append(tokens * (done - window.done) / (seconds["step_s"] * window.steps))
        speed = self.speeds[-1] if self.speeds else 0.0
        return {"step": self.state.step, "loss": self.loss, "lr": self.update.lr, "grad_norm": self.sync.grad_norm,
                "tokens": round(done * tokens), "tokens_per_s": speed,
                "mfu": speed * self.flops_per_token / self.peak_flops, "skipped": self.state.skipped,
                **self.sync.told(), **self._stragglers(), **seconds}

    def _stragglers(self) -> dict[str, Any]:
        lagging = self.heart.lagging if self.heart is not None else {}
        return {"stragglers": {str(rank): round(ratio, 2) for rank, ratio in lagging.items()}} if lagging else {}

    @contextmanager
    def _timed(self, key: str, doing: str) -> Iterator[None]:
        self.where.enter(doing)
        started = time.perf_counter()
        yield
        self.seconds[key] = time.perf_counter() - started


def validates(config: Config, step: int) -> bool:
    """Whether the validation loss after so many steps is wanted."""
    every = config.log.validate_every
    return every > 0 and (step % every == 0 or step == config.run.steps)


def due(config: Config, step: int) -> bool:
    """Whether there is a record after so many steps."""
    return validates(config, step) or step in (1, config.run.steps) or step % config.log.every == 0


def heed_skips(config: Config, step: int, update: Update, grad_norm: float, *, workers: int) -> None:
    """Say that the last update was left out, if it was.

    Args:
        workers: Who each make an update in every step, where they do not wait for each other.

    Raises:
        UserError: Those of `run.max_skipped` steps were, one after the other.
    """
    tell_skip(step, update, grad_norm)
    limit, optim = config.run.max_skipped * (workers if layout.staleness(config) else 1), config.optim
    if update.skipped_in_a_row >= limit:
        raise UserError(f"Step {step}: the gradient norm was NaN or infinite {limit} times in a row. Lower --optim.lr "
                        f"{optim.lr}, raise --optim.warmup_steps {optim.warmup_steps}, or look at the data of these "
                        "steps. Nothing was saved meanwhile. If the same command fails again, what the newest "
                        "checkpoint has was lost before: give an older one to --run.resume, and another --run.dir.")


def tell_skip(step: int, update: Update, grad_norm: float) -> None:
    """Say that the last update was left out, if it was."""
    if update.skipped_in_a_row:
        say(f"step {step}: the gradient norm is {grad_norm}; step skipped ({update.skipped_in_a_row} in a row, "
            f"{update.skipped} in all)")


class Window:
    """Where the time of the steps since the last record went, and what they sent; not what is told in between.

    Attributes:
        done: Steps of the whole batch that were done when it began.
    """

    def __init__(self, done: float) -> None:
        self.restart(done)

    def restart(self, done: float) -> None:
        """Forget everything and start the clock."""
        self.done = done
        self.started, self.steps, self.sent = time.perf_counter(), 0, Traffic.sent
        self.sums: dict[str, float] = {}

    def add(self, seconds: dict[str, float]) -> None:
        """One more step, which took `seconds` for its parts."""
        self.steps += 1
        for key, value in seconds.items():
            self.sums[key] = self.sums.get(key, 0.0) + value

    def means(self) -> dict[str, float]:
        """Seconds per step, in all and by part, and MiB that this rank sent to others."""
        elapsed, sent, steps = time.perf_counter() - self.started, Traffic.sent - self.sent, max(1, self.steps)
        means = {key: value / steps for key, value in self.sums.items()}
        return {"step_s": elapsed / steps, "sent_mib": sent / steps / 2**20, **means}
