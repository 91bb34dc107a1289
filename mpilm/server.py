"""The loop of a rank that serves: an update, then what happens between updates; the trainer's counterpart.

    worker    batch -> pipeline -> push, pull                       trainer.py
    server    gradients -> update -> send -> save if it is time     this file

Servers hold the truth, so they alone save. They do so at steps at which all workers wait for each other: there is one
set of parameters then, whatever the staleness.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mpilm.config import Config
from mpilm.heartbeat import Where
from mpilm.log import say, warn
from mpilm.optim import Update
from mpilm.parallel import layout
from mpilm.saver import Saver
from mpilm.state import TrainState
from mpilm.stop import Stop
from mpilm.sync._server import Server
from mpilm.trainer import heed_skips


def meets(config: Config, step: int) -> bool:
    """Whether all workers wait for each other after `step`, because something is done with one set of parameters."""
    lockstep = layout.staleness(config) == 0
    return lockstep or any(every and step % int(every) == 0
                           for every in (config.log.validate_every, config.checkpoint.every))


@dataclass
class Serving:
    """The assembled program of a rank that serves (see assemble.py). Collective over all that do, like every method.

    Attributes:
        validation, speeds: None and nothing: those are the workers'.
    """

    config: Config
    state: TrainState
    server: Server
    update: Update
    saver: Saver
    stop: Stop
    where: Where
    validation: None = None
    speeds: list[float] = field(default_factory=list)
    reason: str | None = None

    def run(self) -> str | None:
        """Serve until all workers have done `run.steps` steps, or something asks for a stop: returns what."""
        if not meets(self.config, 0):   # a multiple of every interval there is
            warn("Workers never wait for each other here, so signals and time limits are not heeded and nothing is "
                 "saved before the end: give --checkpoint.every or --log.validate_every a number of steps.")
        while not self.server.clocks.over and self.reason is None:
            self.step()
            self._after_step()
        self.server.finish()
        self.stop.meet()    # before anyone looks how the last save is getting on, which makes it complete
        self.saver.after_step(self.state, last=True, sound=True)    # what began at its end is not here yet
        self.saver.wait()
        self._tell()
        return self.reason

    def abandon(self) -> None:
        """End its threads, without asking other ranks: they may be gone. Local."""
        self.saver.abandon()

    def step(self) -> None:
        """One update, of the gradients of one worker or of all."""
        self.where.step = self.state.step
        self.where.enter("serving")
        self.server.serve(self.update)
        clocks = self.server.clocks
        self.state = TrainState.after(clocks.slowest, self.update)
        heed_skips(self.config, max(clocks.done), self.update, self.server.grad_norm, workers=self.server.roles.workers)

    def _after_step(self) -> None:
        clocks = self.server.clocks
        if clocks.met:
            self.where.step = self.state.step
            self.where.enter("saving")
            self.stop.save_s = self.saver.save_s
            self.reason = self.stop.after_step(last=clocks.over)
            self.saver.after_step(self.state, last=clocks.over or self.reason is not None,
                                  sound=not self.update.skipped_in_a_row)
        else:
            self.saver.poll()

    def _tell(self) -> None:
        staleness = self.server.staleness
        if staleness.most:
            counts = ", ".join(f"{count:,} x {name}" for name, count in staleness.histogram().items())
            say(f"staleness of gradients: mean {staleness.mean:.2f}, max {staleness.most} ({counts})")
