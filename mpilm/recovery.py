"""What a run does when ranks die: those who are left go on in the same job, where the launcher lets them (ulfm.py).

    train            step 41 | step 42: everyone has agreed to take it | a rank is killed
    survivors        finish what the dead left half done, save step 42, arrange themselves anew, go on with step 43

A step counts from the moment at which all agree on it (Trainer.settled), so the survivors stand at the same one. What
they hold is saved as any checkpoint is, if together they hold everything: replicas do. Otherwise the newest
checkpoint is read. Then the program is assembled over the ranks that are left, `run.spares` first among the reserves: a
checkpoint does not depend on the layout, and in reproducible mode nor do the bits of what follows.

Ranks may die at any moment, so also in here. Every attempt therefore ends the same way, at `World.base`: those who
are alive tell each other whether they are done, and if anyone is not, all of them begin again.
"""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mpilm import assemble, resume
from mpilm.asked import Asked
from mpilm.checkpoint import Writer
from mpilm.comm import p2p
from mpilm.config import Config
from mpilm.failure import EndError
from mpilm.heartbeat import PATIENT, Pulse
from mpilm.launch import World
from mpilm.log import UserError, counted, say, warn
from mpilm.parallel import layout
from mpilm.saver import Saver
from mpilm.server import Serving
from mpilm.state import Owed, Past, describe
from mpilm.stop import AGAIN
from mpilm.trainer import Trainer, due

SPARE_NAP_S = 0.02
TOO_FEW = 76    # exit code: the ranks that are left can't train this model; the same command goes on with more
Program = Trainer | Serving
Finish = Callable[[Program, Config, World], None]


class Share(NamedTuple):
    """A rank's number among those who hold the same, as Saver takes it."""

    rank: int
    size: int


@dataclass
class Run:
    """A run over all its deaths.

    Args:
        world: Everyone, spares too.
        asked: Whether it must stop before its end.
        prepare: What comes before anything else, once; again if somebody dies in it. Collective over a world.
        greet: Called with a world whose rank 0 may be a new one.
        finish: What to do when all steps are done. Collective over those who trained.
    """

    config: Config
    world: World
    asked: Asked
    prepare: Callable[[World], None]
    greet: Callable[[World], None]
    finish: Finish
    program: Program | None = None
    past: Past | None = None
    prepared: bool = field(default=False, init=False)
    done: bool = field(default=False, init=False)
    reason: str | None = field(default=None, init=False)     # why it stopped before the end
    noticed: float = field(default=math.nan, init=False)
    pulse: Pulse = field(init=False)

    def __post_init__(self) -> None:
        self.pulse = Pulse(self.config.run)

    def run(self) -> None:
        """Train to the end. Collective over the world.

        Raises:
            EndError: So many have died that no layout is left; or it stopped before the end (stop.py).
        """
        say(promise(self.world, self.config))
        with closing(self.pulse):
            self._until_done()
        if self.reason is not None:
            raise EndError(AGAIN, f"stopped because {self.reason}; saved, and the same command goes on")

    def _until_done(self) -> None:
        attempt = self._attempt
        while True:
            try:
                attempt()
            except Exception as error:
                self._require_loss(error)
            if self.world.base is None or self._all_done():
                return
            attempt = self._recover

    def _require_loss(self, error: Exception) -> None:
        if self.world.base is None or not self.world.base.lost(error):
            raise error
        self.noticed = time.perf_counter()
        traceback.clear_frames(error.__traceback__)     # they hold the program that has ended
        self.world.base.revoke()
        if isinstance(self.program, Trainer):
            self.program.commit.withdraw()

    def _all_done(self) -> bool:
        assert self.world.base is not None
        return self.world.base.all_say(self.done)

    def _attempt(self) -> None:
        """Assemble, train, finish; or wait, as a spare. Collective over the world."""
        where = self.pulse.over(self.world)
        if not self.prepared:
            where.enter("preparing", PATIENT)
            self.prepare(self.world)
            self.prepared = True
            p2p.barrier(self.world.comm)    # if one who is left never got here, nobody has gone on from here
        config, crew = self._muster()
        if crew is not None:
            where.enter("assembling", PATIENT)
            self.program = assemble.program(config, crew, self.asked, self.past, self.pulse)
            self.reason = self.program.run()
            if self.reason is None:
                where.enter("telling how it ended", PATIENT)
                self.finish(self.program, config, crew)
        self.done = crew is not None
        where.enter("waiting, as a spare" if crew is None else "waiting for the others to end")
        # Spares wait here for all of the run, and if it fails they can't tell whether the others had finished.
        p2p.barrier(self.world.comm, longest_s=SPARE_NAP_S)
        self.done = True

    def _muster(self) -> tuple[Config, World | None]:
        """How to train, and with whom: None for a spare. Collective over the world."""
        config, world = self.config, self.world
        count = world.size - config.run.spares
        if self.past is not None:
            shape = assemble.shape_of(config, assemble.open_split(config, "train").vocab_size)
            found = layout.fitted(config, shape, world.size)
            if found is None:
                raise EndError(TOO_FEW, f"{counted(world.size, 'rank')} left, and no layout with these options works "
                                        "on so few. The run is saved; the same command goes on with more.")
            config, count = found
        elif count < 1:
            raise UserError(f"--run.spares {config.run.spares}: with {counted(world.size, 'rank')} nobody would be "
                            f"left to train. Start more ranks, or give {world.size - 1} or fewer.")
        crew = world.first(count)
        return config, crew if world.rank < count else None

    def _recover(self) -> None:
        """Save what is left, and go on with it. Collective over those who are alive."""
        self.done = False
        self._rescue()
        gc.collect()
        self._attempt()

    def _rescue(self) -> None:
        """Arrange the living as a new world, and put away the program of the old one."""
        old = self.world
        self.world = old.survivors()
        self.pulse.over(self.world).enter("saving what is left", PATIENT)
        self.greet(self.world)
        say(f"{counted(old.size - self.world.size, 'rank')} of {old.size} died. "
            f"{counted(self.world.size, 'rank')} left.")
        self.prepared = all(self.world.comm.allgather(self.prepared))
        if self.prepared:
            rescue(self.program, self.world, self.config)
        saver = self.program and self.program.saver
        self.past = Past(self.noticed, saver.about["arithmetic"] if isinstance(saver, Saver) else {})
        self.program = None
        old.abandon()


def promise(world: World, config: Config) -> str:
    """What happens when a rank dies, in a sentence."""
    if world.base is None:
        return "If a rank dies, the job ends, and the same command goes on from the newest checkpoint."
    spares = f"; {counted(config.run.spares, 'spare')} to step in" if config.run.spares else ""
    return f"If a rank dies, the others go on (ULFM is on){spares}."


def rescue(program: Program | None, world: World, config: Config) -> None:
    """Save what those of `world` hold of the program that a death has ended, if together it is everything. Collective
    over `world`."""
    wreck = program if isinstance(program, Trainer) else None
    mine = -1
    if wreck is not None:
        wreck.abandon()
        if wreck.sync.inherit(world.comm.Get_group()):
            mine = wreck.mesh.parts.rank
    holders: list[tuple[int, int]] = world.comm.allgather((mine, wreck.mesh.parts.size if wreck else 0))
    parts, wanted = [part for part, _ in holders], max(size for _, size in holders)
    if not wanted or not set(range(wanted)) <= set(parts):
        say("Not everything is left of what the ranks had: the run goes on from its newest checkpoint.")
        return
    try:
        _save(wreck if mine >= 0 else None, world, config, parts)
    except UserError as error:
        warn(f"{error} The run goes on from its newest checkpoint.")


def _save(wreck: Trainer | None, world: World, config: Config, parts: list[int]) -> None:
    writer = Writer(Path(config.run.dir) / resume.CHECKPOINTS, world.dup("rescue"),
                    keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every)
    told, pieces = None, []
    if wreck is not None:
        mine = parts[world.rank]
        share = Share(parts[:world.rank].count(mine), parts.count(mine))
        state = wreck.settled()
        assert isinstance(wreck.saver, Saver)
        owed = Owed(wreck.loss, wreck.sync.grad_norm, wreck.update.lr) if due(config, state.step) else None
        told = (state.step, describe(state, wreck.saver.about, owed))
        pieces = wreck.saver.pieces(share.rank, share.size)
    step, meta = next(filter(None, world.comm.allgather(told)))
    if step:
        writer.save(step, pieces, meta)
        writer.wait()
