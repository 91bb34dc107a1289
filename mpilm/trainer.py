"""The loop: batch -> pipeline -> sync -> state.

What happens between steps (metrics, validation, checkpoints) never enters the arithmetic of a step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from mpilm.comm.p2p import Traffic
from mpilm.config import Config
from mpilm.data.loader import Loader
from mpilm.log import UserError, say
from mpilm.metrics import Metrics
from mpilm.optim import Update
from mpilm.parallel.losses import Losses
from mpilm.parallel.pipeline import Pipeline
from mpilm.saver import Elsewhere, Saver
from mpilm.state import TrainState
from mpilm.sync import Synchronizer
from mpilm.validation import Validation


@dataclass
class Trainer:
    """The assembled program of a rank that trains (see assemble.py). Collective over all that do, like every method."""

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
    flops_per_token: int
    peak_flops: float
    seconds: dict[str, float] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)  # tokens/s of every record

    def run(self) -> None:
        """Train until `run.steps` steps are done."""
        with closing(self.metrics):
            window = Window(self.sync.done(self.state.step))
            while self.state.step < self.config.run.steps:
                loss = self.step()
                window.add(self.seconds)
                self._tell(loss, window)
                self.saver.after_step(self.state, last=self.state.step == self.config.run.steps)
            self.saver.wait()

    def step(self) -> float:
        """One update; returns the mean loss of the global batch before it, nats per token."""
        with self._timed("data_s"):
            batch = self.loader.batch(self.state.step)
        with self._timed("compute_s"):
            mine = self.pipeline.run(batch)
        self.seconds["bubble_s"] = self.pipeline.wait_s
        self.update.begin(self.state.step)
        self.sync.step(self.update)
        with self._timed("comm_s"):
            loss = self.losses.mean(mine)
        self.seconds["comm_s"] += self.sync.seconds["comm_s"]
        self.seconds["optim_s"] = self.sync.seconds["optim_s"]
        self._count()
        return loss

    def _count(self) -> None:
        self.state.step += 1
        self.state.applied, self.state.skipped = self.update.applied, self.update.skipped
        heed_skips(self.config, self.state.step, self.update, self.sync.grad_norm)

    def _tell(self, loss: float, window: Window) -> None:
        step, log = self.state.step, self.config.log
        last = step == self.config.run.steps
        validate = self.validation is not None and (step % log.validate_every == 0 or last)
        if not (validate or last or step % log.every == 0 or step == 1):
            return
        values = self._values(loss, window)
        if validate and self.validation is not None:
            values["validation_loss"] = self.validation.loss()
        self.metrics.record(values)
        window.restart(self.sync.done(step))

    def _values(self, loss: float, window: Window) -> dict[str, Any]:
        data, seconds, done = self.config.data, window.means(), self.sync.done(self.state.step)
        tokens = data.global_batch_size * data.sequence_length
        self.speeds.append(tokens * (done - window.done) / (seconds["step_s"] * window.steps))
        return {"step": self.state.step, "loss": loss, "lr": self.update.lr, "grad_norm": self.sync.grad_norm,
                "tokens": round(done * tokens), "tokens_per_s": self.speeds[-1],
                "mfu": self.speeds[-1] * self.flops_per_token / self.peak_flops, "skipped": self.state.skipped,
                **self.sync.told(), **seconds}

    @contextmanager
    def _timed(self, key: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[key] = time.perf_counter() - started


def heed_skips(config: Config, step: int, update: Update, grad_norm: float) -> None:
    """Say that the last update was left out, if it was.

    Raises:
        UserError: `run.max_skipped` were, one after the other.
    """
    if not update.skipped_in_a_row:
        return
    say(f"step {step}: the gradient norm is {grad_norm}; step skipped ({update.skipped_in_a_row} in a row, "
        f"{update.skipped} in all)")
    limit, optim = config.run.max_skipped, config.optim
    if update.skipped_in_a_row >= limit:
        raise UserError(f"Step {step}: the gradient norm was NaN or infinite {limit} times in a row. Lower --optim.lr "
                        f"{optim.lr}, raise --optim.warmup_steps {optim.warmup_steps}, or look at the data of these "
                        "steps; checkpoints from before are intact.")


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
        elapsed, sent = time.perf_counter() - self.started, Traffic.sent - self.sent
        means = {key: value / self.steps for key, value in self.sums.items()}
        return {"step_s": elapsed / self.steps, "sent_mib": sent / self.steps / 2**20, **means}
