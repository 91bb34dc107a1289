"""From a launched process to a rank that knows its place: `session` is where every program begins and ends.

    with session(run_dir="runs/demo") as world:       # mpirun -np 8 python -m mpilm.train
        comm = world.dup("checkpoint")                # one communicator for each purpose
        files = on_root(world.comm, list_files)       # what only rank 0 looks at, told to all

Order matters, so it is all here: memory allocation is tuned by starting the process anew (the pid stays), the
launcher's local rank chooses the GPU, MPI starts, the launcher's word is checked against MPI's, threads are shared out
before numpy or torch are imported, and from then on an error on any rank ends the job (see failure.py).
Nothing of MPI is imported outside a session, so `--help` is quick.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from mpilm import log, placement, starting, startup
from mpilm.failure import EndError, Guard, RankError, agree, on_root
from mpilm.log import HostError, UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpilm.ulfm import Base

__all__ = ["RankError", "World", "agree", "command", "on_root", "session"]


class Freed(Protocol):
    """What holds communicators and gives them back."""

    def free(self) -> None:
        """Collective over the ranks that hold it."""


Owned = TypeVar("Owned", bound=Freed)


@dataclass(frozen=True)
class World:
    """All ranks of the program, and where this one stands.

    Args:
        comm: For control: a duplicate of COMM_WORLD.
        rank: Number of this rank.
        size: Number of ranks.
        local_rank: Number of this rank on its node.
        local_size: Ranks on the node.
        host: The node's name.
        device: "cpu" or "cuda:<index>".
        threads: This rank's share of the node's cores, or what OMP_NUM_THREADS says; for torch.set_num_threads.
        cores: Physical cores that this rank may run on.
        memory: Bytes: this rank's share of what the node had available at the start.
        thread_level: What MPI provides; MPI.THREAD_MULTIPLE where the MPI library can.
        base: Where those who are left meet when ranks die (ulfm.py); None where a death ends the job.
    """

    comm: MPI.Comm
    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    device: str
    threads: int
    cores: tuple[int, ...]
    memory: int
    thread_level: int
    base: Base | None = None
    _guard: Guard | None = None
    _owned: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    def dup(self, purpose: str, comm: MPI.Comm | None = None) -> MPI.Comm:
        """A communicator of its own for one purpose; freed with the session. Collective over `comm`, or the world."""
        duplicate: MPI.Comm = (comm or self.comm).Dup()
        duplicate.Set_name(purpose)
        self._owned.callback(duplicate.Free)
        return duplicate

    def owns(self, thing: Owned) -> Owned:
        """Free `thing` with the session: an MPI has few communicators (MPICH 2,048) and a process may have many
        sessions. Returns it."""
        self._owned.callback(thing.free)
        return thing

    def table(self) -> str:
        """The placement table on rank 0, empty elsewhere. Collective over the world."""
        place = placement.Place(self.rank, self.host, self.device, self.cores, self.threads, self.memory)
        places = self.comm.gather(place)
        return placement.table(places) if places is not None else ""

    def alone(self) -> World:
        """This rank as a world of one, which ends with this one: each rank for itself."""
        from mpi4py import MPI

        comm: MPI.Comm = MPI.COMM_SELF.Dup()
        one = replace(self, comm=comm, rank=0, size=1, local_rank=0, local_size=1, _owned=ExitStack())
        return self.owns(one)

    def first(self, count: int) -> World:
        """The first `count` ranks, and the others, as worlds that end with this one. Collective over the world."""
        comm = self.comm.Split(self.rank >= count, key=self.rank)
        return self.owns(replace(self, comm=comm, rank=comm.rank, size=comm.size, _owned=ExitStack()))

    def survivors(self) -> World:
        """Those who are alive, as a world of their own. Collective over them.

        Raises:
            MPI.Exception: Another one has died.
        """
        assert self.base is not None, "where a death ends the job there are no survivors"
        world = _arrive(self.device, self.base, self.base.shrink().Dup(), self._guard)
        if self._guard is not None:
            self._guard.comm = world.comm.Dup()
        return world

    def abandon(self) -> None:
        """Give back what it owns as far as that goes after a death. Local."""
        with suppress(Exception):
            self._owned.close()
        with suppress(Exception):
            self.comm.Free()

    def free(self) -> None:
        """Give back all that it owns, the youngest first. Collective over the world."""
        self._owned.close()
        self.comm.Free()


def command(main: Callable[[], None], *, tune: bool = True) -> None:
    """Run a command's `main`; a UserError before its session is told once, without traceback: exit code 2.
    A HostError first starts MPI, so that it ends all ranks. Collective over all ranks.

    Args:
        tune: Whether to start anew under our settings for malloc, before anything else is done; a benchmark may want
            the usual ones.
    """
    startup.open_streams()
    if tune:
        startup.tune_malloc()
    try:
        main()
    except UserError as error:
        launcher = placement.launcher(os.environ)
        if launcher and isinstance(error, HostError):   # the others may be waiting in MPI_Init, which need not end
            with session():
                raise
        startup.end_all(str(error), launcher)


@contextmanager
def session(*, run_dir: str | Path | None = None, device: str = "host") -> Iterator[World]:
    """Start MPI, find this rank's place, and end the job together. Collective over all ranks.

    With a `run_dir`, rank 0 also writes what it says to log.txt there and prints the placement table. Inside a program
    that has started MPI itself (a test) the session ends nothing, and errors pass through.

    Args:
        run_dir: The run directory; made where it is missing.
        device: Whether to choose a GPU by local rank, as `run.device`.

    Raises:
        SystemExit: With code 2 on every rank after a UserError.
    """
    if _mpi_is_running():
        from mpi4py import MPI

        world = _arrive("cpu", None, MPI.COMM_WORLD.Dup(), None)
        try:
            greet(world, run_dir)
            yield world
        except (UserError, EndError):   # all ranks leave, if not all of them by this
            world.free()
            raise
        world.free()
        return
    launcher = placement.launcher(os.environ)
    if _mpi_has_ended():
        startup.end_all("MPI ended with this program's first session, and can't be started again: put what belongs "
                        "together into one `with mpilm.launch.session():`.", launcher)
    startup.allow_open_files()
    chosen = startup.choose_gpu((launcher and launcher.local_rank) or 0, device)
    with starting.within(launcher):
        startup.start_mpi(launcher)
        from mpi4py import MPI

        from mpilm import ulfm

        faulthandler.enable()  # a crash in compiled code shows where Python was
        base = ulfm.Base(MPI.COMM_WORLD.Dup()) if ulfm.active() else None
        watch = Guard(MPI.COMM_WORLD.Dup())
    try:
        with watch as guard:
            with starting.within(launcher):
                world = _arrive(chosen, base, (base.root if base else MPI.COMM_WORLD).Dup(), guard)
                greet(world, run_dir)
            yield world
    finally:  # whoever gets here leaves together with all other ranks
        if base is None:
            MPI.Finalize()
        else:
            base.leave()


def _mpi_is_running() -> bool:
    return _asked_mpi("Is_initialized") and not _mpi_has_ended()


def _mpi_has_ended() -> bool:
    return _asked_mpi("Is_finalized")


def _asked_mpi(question: str) -> bool:
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and bool(getattr(mpi, question)())


def _arrive(device: str, base: Base | None, comm: MPI.Comm, guard: Guard | None) -> World:
    """Meet the other ranks, share out the cores. Collective over `comm`."""
    from mpi4py import MPI

    comm.Set_name("control")
    log.setup(comm.rank)
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    cores = placement.cores()
    of_node: list[set[int]] = node.allgather(set(cores))
    fair = placement.fair_threads(of_node, node.rank, quota=placement.cpu_quota())
    threads = placement.wanted_threads(os.environ) or fair
    if threads > placement.MOST_THREADS:
        raise UserError(f"OMP_NUM_THREADS={threads}: unset it, or give a number up to {placement.MOST_THREADS:,}.")
    for variable in placement.THREAD_VARIABLES:
        if placement.wanted_threads(os.environ, variable) is None:
            os.environ[variable] = str(threads)
    memory = node.bcast(placement.available_memory()) // node.size
    world = World(comm, comm.rank, comm.size, node.rank, node.size, socket.gethostname(), device, threads,
                  tuple(cores), memory, comm.allreduce(MPI.Query_thread(), op=MPI.MIN), base, guard)
    node.Free()
    return world


def greet(world: World, run_dir: str | Path | None) -> None:
    """With a `run_dir`, have rank 0 write its log there and print the placement table. Collective over the world."""
    if run_dir is None:
        return
    on_root(world.comm, lambda: _open_log(run_dir))
    log.say(world.table())


def make_directory(path: str | Path, *, option: str = "run.dir") -> None:
    """Where a run, or what has another `option` for it, writes. Local.

    Raises:
        UserError: It cannot be made.
    """
    with _named(path, option):
        Path(path).mkdir(parents=True, exist_ok=True)


def _open_log(run_dir: str | Path) -> None:
    """Have this rank write log.txt there. Local. Raises as `make_directory`."""
    with _named(run_dir, "run.dir"):
        log.setup(0, run_dir)


@contextmanager
def _named(path: str | Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--{option} {path}: {error.strerror} ({error.filename}). "
                        "Name a directory that exists or can be made, and that you may write to.") from None
