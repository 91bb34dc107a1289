"""Communicators of a program that goes on when ranks die: User Level Failure Mitigation (Bland et al., 2013).

Under `mpirun --with-ft ulfm` (Open MPI 5 and newer) an operation with a dead rank raises an error; elsewhere the
launcher ends the whole job. Only ranks that wait for the dead one hear of it, so whoever does revokes every
communicator it knows, and all ranks get out of whatever they wait in.

    base = Base(MPI.COMM_WORLD.Dup())
    comm = base.root.Dup()      # this one, and whatever is made from it, base.revoke() ends
    try:
        ...
    except Exception as error:
        if not base.lost(error):
            raise
        base.revoke()
        comm = base.shrink().Dup()      # those who are alive, in the same order

Survivors may have come to know of several deaths in different places, but all of them meet at the base: only agreement
and shrinking happen there, and they always work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from typing import Any

from mpi4py import MPI

from mpilm.failure import EndError
from mpilm.log import UserError
from mpilm.starting import active as active

# Within which the launcher tells of a death that an operation has stumbled over, even on a machine with much to do: of
# an error of MPI's, which hardly has another cause, and of any other.
SURE_S, UNSURE_S = 30.0, 3.0
WATCH_S = 0.05


class Revocable(MPI.Intracomm):
    """A communicator of a family.

    Attributes:
        family: Itself, where it comes from, and whatever comes from them.
    """

    family: Family

    def Dup(self, info: MPI.Info | None = None) -> Revocable:  # noqa: N802 - MPI's names
        """As MPI's."""
        return self.family.adopt(super().Dup(info))

    def Split(self, color: int = 0, key: int = 0) -> Revocable:  # noqa: N802
        """As MPI's; every rank has a color."""
        return self.family.adopt(super().Split(color, key))

    def Split_type(self, split_type: int, key: int = 0, info: MPI.Info = MPI.INFO_NULL) -> Revocable:  # noqa: N802
        """As MPI's."""
        return self.family.adopt(super().Split_type(split_type, key, info))

    def allreduce(self, sendobj: Any, op: MPI.Op | Callable[[Any, Any], Any] = MPI.SUM) -> Any:
        """As mpi4py's, which makes a communicator of its own that nobody could revoke."""
        return reduce(op, self.allgather(sendobj))

    def Free(self) -> None:  # noqa: N802
        """As MPI's."""
        with self.family.lock:
            self.family.members[:] = [comm for comm in self.family.members if comm is not self]
            super().Free()


class Family:
    """A communicator and all that are made from it, as long as they are not freed."""

    def __init__(self, root: MPI.Comm) -> None:
        self.lock, self.members = threading.RLock(), list[Revocable]()
        self.root = self.adopt(root)

    def adopt(self, made: MPI.Comm) -> Revocable:
        """The same communicator, as one of the family."""
        child = Revocable(made)
        child.family = self
        with self.lock:
            self.members.append(child)
        return child

    def revoke(self) -> None:
        """Have every operation on any of them raise, on all ranks. Local."""
        with self.lock:
            for member in self.members:
                if not member.Is_revoked():
                    member.Revoke()


class Base:
    """Where the living meet, and the communicators that end with every death.

    Open MPI drops the news that a communicator is revoked on ranks that are still making it. So nobody uses a root
    before all have it, and a thread passes its end on to the rest of the family as long as there is something left.

    Args:
        comm: All ranks; only for this. Collective over it.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm, self.over = comm, threading.Event()
        self.family = Family(comm.Dup())
        self.thread = threading.Thread(target=self._watch, name="deaths", daemon=True)
        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            self.thread.start()

    @property
    def root(self) -> Revocable:
        """Everyone who was alive after the last death; not to be freed."""
        return self.family.root

    def _watch(self) -> None:
        while not self.over.wait(WATCH_S):
            family = self.family    # of this moment: a new one must not be ended for the old one's sake
            if family.root.Is_revoked():
                family.revoke()

    def lost(self, error: Exception) -> bool:
        """Whether an error comes of a death.

        An operation that notices it first may just fail with MPI_ERR_OTHER, or a collective of Open MPI's succeed with
        garbage that nobody can read; then the launcher's word counts. A mistake of our own will show again, and one of
        the user's, or the end, is known to all ranks without waiting.
        """
        certain = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)
        if isinstance(error, MPI.Exception) and error.Get_error_class() in certain:
            return True
        known = isinstance(error, UserError | EndError)
        patience = 0 if known else SURE_S if isinstance(error, MPI.Exception) else UNSURE_S
        deadline = time.monotonic() + patience
        while not (found := self.root.Is_revoked() or self.root.Get_failed().size > 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        return bool(found)

    def revoke(self) -> None:
        """Have every operation on the family raise, on all ranks. Local."""
        self.family.revoke()

    def shrink(self) -> Revocable:
        """A new root, of those who are alive. Collective over them, and cannot fail."""
        self.family = Family(self.comm.Shrink())
        self.all_say(True)
        return self.root

    def all_say(self, flag: bool) -> bool:
        """Whether all who are alive say yes: the same answer to all. Collective over them, and cannot fail."""
        while True:
            try:
                return bool(self.comm.Agree(int(flag)))
            except MPI.Exception as error:  # to all alike: somebody has died since the last time
                if error.Get_error_class() != MPI.ERR_PROC_FAILED:
                    raise
                self.comm.Ack_failed()

    def leave(self) -> None:
        """Meet all who are alive for the last time; what follows is the end of the process, without MPI_Finalize.

        That waits for a fence of the launcher's, which after a death close to another never comes about (seen in Open
        MPI 5.0's PRRTE); and the launcher takes it well, and removes what is left in /dev/shm, when nobody finalizes.
        """
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()
        self.all_say(True)


def living(comm: MPI.Comm, alive: MPI.Group) -> list[int]:
    """The ranks of `comm` that are members of a group. Local."""
    group = comm.Get_group()
    places = MPI.Group.Translate_ranks(group, list(range(group.size)), alive)
    return [rank for rank, place in enumerate(places) if place != MPI.UNDEFINED]


class Commit:
    """Steps that all ranks of a communicator take together or not at all.

    Everyone who is alive answers exactly once for every step: in it, or, for one that it cannot finish, by `withdraw`.
    So after a death all that are left have taken the same steps.

    Args:
        comm: Private to it; None where nobody outlives anybody.

    Attributes:
        steps: Taken so far.
    """

    def __init__(self, comm: MPI.Comm | None = None) -> None:
        self.comm, self.steps, self.answered = comm, 0, False

    def take(self) -> None:
        """Return when all have everything the next step needs. Collective over `comm`.

        Raises:
            MPI.Exception: Somebody has died or withdrawn, on all who are alive.
        """
        if self.comm is not None:
            self.answered = True
            if not self.comm.Agree(1):
                raise MPI.Exception(MPI.ERR_REVOKED)
            self.answered = False
        self.steps += 1

    def withdraw(self) -> None:
        """This rank takes no step any more: nobody may wait for it."""
        if self.comm is not None and not self.answered:
            self.answered = True
            with suppress(MPI.Exception):   # those who take the step get the same answer
                self.comm.Agree(0)
