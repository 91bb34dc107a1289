"""What a run does when ranks die: those who are left go on in the same job, where the launcher lets them (ulfm.py).

    train            step 41 | step 42: everyone has agreed to take it | a rank is killed
    survivors        finish what the dead left half done, save step 42, arrange themselves anew, go on with step 43

A step counts from the moment at which all agree on it (Trainer.settled), so the survivors stand at the same one. What
they hold is saved as any checkpoint is, if together they hold everything: replicas do. Otherwise the newest
checkpoint is read. Then the program is assembled over the ranks that are left, `run.spares` first among the reserves: a
checkpoint does not depend on the layout, and in reproducible mode nor do the bits of what follows.

Ranks may die at any moment, so also in here. The run is therefore cut into phases, and after each of them all who are
alive tell each other, at `World.base`, whether they came through: if anyone did not, nobody goes on to the next one.
"""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from mpilm import assemble, resume
from mpilm.asked import Asked
from mpilm.comm import network, p2p
from mpilm.config import Config
from mpilm.failure import GRACE_S, EndError, agree, as_mistake
from mpilm.heartbeat import PATIENT, Pulse
from mpilm.launch import World
from mpilm.log import UserError, counted, say, warn
from mpilm.parallel import layout
from mpilm.saver import Saver, writer
from mpilm.server import Serving
from mpilm.state import Past, describe
from mpilm.stop import AGAIN, Relay
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

    Attributes:
        crew: Those who train, if this rank is one of them. The others are spares: they wait.
        idle: Whether there are any spares.
    """

    config: Config
    world: World
    asked: Asked
    prepare: Callable[[World], None]
    greet: Callable[[World], None]
    finish: Finish
    program: Program | None = None
    past: Past | None = None
    crew: World | None = field(default=None, init=False)
    idle: bool = field(default=False, init=False)
    relay: Relay | None = field(default=None, init=False)
    prepared: bool = field(default=False, init=False)
    training: bool = field(default=False, init=False)   # everyone of the crew has a program
    done: bool = field(default=False, init=False)
    reason: str | None = field(default=None, init=False)     # why it stopped before the end
    noticed: float = field(default=math.nan, init=False)
    pulse: Pulse = field(init=False)
    started: int = field(init=False)    # ranks, before anyone died

    def __post_init__(self) -> None:
        self.pulse, self.started = Pulse(self.config.run), self.world.size

    def run(self) -> None:
        """Train to the end. Collective over the world.

        Raises:
            EndError: So many have died that no layout is left; or it stopped before the end (stop.py).
        """
        with closing(self.pulse):
            while not (self._come_through(self._prepare) and self._come_through(self._assemble) and self._finish()):
                while not self._come_through(self._rescue):
                    pass
        if self.reason is not None:
            raise EndError(AGAIN, f"stopped because {self.reason}; saved, and the same command goes on")

    def _come_through(self, phase: Callable[[], None]) -> bool:
        """Whether all who are alive came to the end of a phase. Collective over them."""
        mine = self._attempt(phase)
        return self.world.base is None or self.world.base.all_say(mine)

    def _finish(self) -> bool:
        """Train: whether all who did and are alive came to the end. Collective over all who are alive."""
        self._attempt(self._train)
        base = self.world.base
        if base is None:
            return True
        if isinstance(self.program, Trainer):   # others may still be at a step that waits for this rank
            self.program.commit.withdraw()
        # A spare can't tell, and if only spares are left nobody can.
        return base.all_say(self.done or self.crew is None) and not base.all_say(not self.done)

    def _attempt(self, phase: Callable[[], None]) -> bool:
        """One phase, and wait for all others at its end; False if somebody has died. Raises what has other reasons."""
        base, mistake = self.world.base, None
        try:
            try:
                phase()
            except Exception as error:
                mistake = as_mistake(error) if self.idle else None
                if mistake is None:
                    raise
            self._meet(mistake)
        except Exception as error:
            if base is None or not base.lost(error):
                raise
            self.noticed = time.perf_counter()
            traceback.clear_frames(error.__traceback__)     # they hold the program that has ended
            base.revoke()
            return False
        return True

    def _meet(self, mistake: UserError | None) -> None:
        """Wait for everyone; spares do for all of the run, and hear of the crew's mistakes here. Collective over the
        world.

        Raises:
            UserError: On all ranks; or this rank's own, if the others do not come.
        """
        patience = math.inf if mistake is None else GRACE_S
        arrived, deadline = self.world.comm.Ibarrier(), time.monotonic() + patience

        def met() -> bool | None:
            if mistake is not None and time.monotonic() > deadline:
                raise mistake
            if self.relay is not None and self.crew is None:    # those who train vote, and nobody hears them here
                self.relay.tell()
            return arrived.Test() or None

        p2p.until(met, longest_s=p2p.LONGEST_NAP_S if self.crew else SPARE_NAP_S)
        if self.idle:
            agree(self.world.comm, mistake)

    def _prepare(self) -> None:
        where = self.pulse.over(self.world)
        if not self.prepared:
            where.enter("preparing", PATIENT)
            self.prepare(self.world)
            say(promise(self.world, self.config))

    def _assemble(self) -> None:
        """The crew and its program; spares have none. Collective over the world."""
        self.prepared, self.training, self.done, self.reason, self.noticed = True, False, False, None, math.nan
        self.pulse.where.enter("assembling", PATIENT)
        config, self.crew = self._muster()
        if self.crew is not None:
            self.program = assemble.program(config, self.crew, self.asked, self.past, self.pulse)

    def _train(self) -> None:
        """Train, and finish. Collective over the crew."""
        self.training = True
        if self.program is not None and self.crew is not None:
            self.reason = self.program.run()
            if self.reason is None:
                self.pulse.where.enter("telling how it ended", PATIENT)
                self.finish(self.program, self.program.config, self.crew)
            self.done = True
        self.pulse.where.enter("waiting, as a spare" if self.crew is None else "waiting for the others to end")

    def _muster(self) -> tuple[Config, World | None]:
        """How to train, and with whom: None for a spare. Collective over the world."""
        config, world = self.config, self.world
        count = world.size - config.run.spares
        if self.past is not None:
            found = self._fitted()
            if found is None:
                raise EndError(TOO_FEW, f"{counted(world.size, 'rank')} left, and no layout with these options works "
                                        f"on so few. {resume.where(config, world.comm)}")
            config, count = found
        elif count < 1:
            raise UserError(f"--run.spares {config.run.spares}: with {counted(world.size, 'rank')} nobody would be "
                            f"left to train. Start more ranks, or give {world.size - 1} or fewer.")
        self.idle = count < world.size
        self.relay = Relay(world.comm, self.asked)
        crew = world.first(count)
        return config, crew if world.rank < count else None

    def _fitted(self) -> tuple[Config, int] | None:
        """A layout for those who are left, of no more ranks than there were at first: the others stay spares."""
        assert self.past is not None, "before a death all that were started have their places"
        shape = assemble.shape_of(self.config, assemble.open_split(self.config, "train").vocab_size)
        return layout.fitted(self.config, shape, min(self.world.size, self.past.ranks))

    def _rescue(self) -> None:
        """Arrange the living as a new world, save what they hold, and put away the program of the old one. Collective
        over those who are alive."""
        old, program = self.world, self.program
        if math.isnan(self.noticed):    # others have, and said so
            self.noticed = time.perf_counter()
        self.world = old.survivors()
        self.pulse.over(self.world).enter("saving what is left", PATIENT)
        self.greet(self.world)
        say(f"{counted(old.size - self.world.size, 'rank')} of {old.size} died. "
            f"{counted(self.world.size, 'rank')} left.")
        if program is not None:
            program.abandon()
        network.line().drop()
        if self.prepared:
            rescue(program if self.training else None, self.world, self.config)
        self.past = self._remember(program)
        self.program = None
        gc.collect()
        old.abandon()

    def _remember(self, program: Program | None) -> Past:
        before = self.past or Past(ranks=self.started - self.config.run.spares)
        saver = program and program.saver
        return replace(before, since=self.noticed, speeds=list(program.speeds) if program else before.speeds,
                       arithmetic=saver.about["arithmetic"] if isinstance(saver, Saver) else before.arithmetic)


def promise(world: World, config: Config) -> str:
    """What happens when a rank dies, in a sentence."""
    if world.base is None:
        if config.run.spares:
            warn(f"--run.spares {config.run.spares}: without ULFM spares can't step in, and only wait. Start with "
                 "mpirun --with-ft ulfm (Open MPI 5), or give --run.spares 0.")
        return "If a rank dies, the job ends, and the same command goes on from the newest checkpoint."
    spares = f"; {counted(config.run.spares, 'spare')} to step in" if config.run.spares else ""
    return f"If a rank dies, the others go on (ULFM is on){spares}."


def rescue(program: Program | None, world: World, config: Config) -> None:
    """Save what those of `world` hold of the program that a death has ended, if together it is everything. Collective
    over `world`."""
    wreck = program if isinstance(program, Trainer) else None
    mine = -1
    if wreck is not None and wreck.sync.inherit(world.comm.Get_group()):
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
    told, pieces = None, []
    if wreck is not None:
        mine = parts[world.rank]
        share = Share(parts[:world.rank].count(mine), parts.count(mine))
        state = wreck.settled()
        assert isinstance(wreck.saver, Saver)
        owed = wreck.taken if due(config, state.step) else None
        told = (state.step, describe(state, wreck.saver.about, owed))
        pieces = wreck.saver.pieces(share.rank, share.size)
    step, meta = next(filter(None, world.comm.allgather(told)))
    if step:
        saves = writer(config, world.dup("rescue"))
        saves.save(step, pieces, meta)
        saves.wait()
