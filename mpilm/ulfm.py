"""Communicators of a program that goes on when ranks die: User Level Failure Mitigation (Bland et al., 2013).

Under `mpirun --with-ft ulfm` (Open MPI 5 and newer) an operation with a dead rank raises an error; elsewhere the
launcher ends the whole job. Only ranks that wait for the dead one hear of it, so whoever does revokes every
communicator it knows, and all ranks get out of whatever they wait in.

    base = revocable(MPI.COMM_WORLD.Dup())      # and whatever is made from it is known by `base.family`
    try:
        ...
    except MPI.Exception as error:
        if not lost(error, base):
            raise
        comm = shrink(base)                     # those who are alive, in the same order

Survivors may have come to know of several deaths in different places, but all of them meet at `base`: only `Agree` and
`Shrink` work on it then, and they always do.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from mpi4py import MPI

SURE_S = 1.0    # within which the launcher tells of a death that an operation has stumbled over


def active() -> bool:
    """Whether ranks outlive each other in this job."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable") == "1"  # noqa: SIM112 - Open MPI's name


class Revocable(MPI.Intracomm):
    """A communicator that knows all those that were made from it.

    Attributes:
        family: It, those that it comes from, and those that come from them, as long as they are not freed.
    """

    family: list[Revocable]

    def _adopt(self, made: MPI.Comm) -> Revocable:
        child = Revocable(made)
        child.family = self.family
        self.family.append(child)
        return child

    def Dup(self, info: MPI.Info | None = None) -> Revocable:  # noqa: N802 - MPI's names
        """As MPI's."""
        return self._adopt(super().Dup(info))

    def Split(self, color: int = 0, key: int = 0) -> Revocable:  # noqa: N802
        """As MPI's; every rank has a color."""
        return self._adopt(super().Split(color, key))

    def Split_type(self, split_type: int, key: int = 0, info: MPI.Info = MPI.INFO_NULL) -> Revocable:  # noqa: N802
        """As MPI's."""
        return self._adopt(super().Split_type(split_type, key, info))

    def Free(self) -> None:  # noqa: N802
        """As MPI's."""
        self.family[:] = [comm for comm in self.family if comm is not self]
        super().Free()


def revocable(comm: MPI.Comm) -> Revocable:
    """The same communicator, at the head of a family of its own."""
    head = Revocable(comm)
    head.family = [head]
    return head


def lost(error: BaseException, base: MPI.Comm) -> bool:
    """Whether an error comes of a rank's death.

    An operation that notices it first may just fail with MPI_ERR_OTHER, or a collective of Open MPI's succeed with
    garbage that nobody can read; then the launcher's word counts. A mistake of our own will show again.
    """
    if not active():
        return False
    certain = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)
    if isinstance(error, MPI.Exception) and error.Get_error_class() in certain:
        return True
    deadline = time.monotonic() + SURE_S
    while not (found := base.Is_revoked() or base.Get_failed().size > 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(found)


def revoke(base: Revocable) -> None:
    """Have every operation on the family of `base` raise, on all ranks. Local."""
    for member in list(base.family):
        if not member.Is_revoked():
            member.Revoke()


def shrink(base: Revocable) -> Revocable:
    """Those of `base` who are alive. Collective over them, and cannot fail."""
    return base._adopt(base.Shrink())


def all_say(base: MPI.Comm, flag: bool) -> bool:
    """Whether all who are alive say yes: the same answer to all. Collective over them, and cannot fail."""
    while True:
        try:
            return bool(base.Agree(int(flag)))
        except MPI.Exception as error:  # to all alike: somebody has died since the last time
            if error.Get_error_class() != MPI.ERR_PROC_FAILED:
                raise
            base.Ack_failed()


def leave(base: MPI.Comm) -> None:
    """Meet all who are alive for the last time; what follows is the end of the process, without MPI_Finalize.

    That waits for a fence of the launcher's, which after a death close to another never comes about (seen in Open MPI
    5.0's PRRTE); and the launcher takes it well, and removes what is left in /dev/shm, when nobody finalizes.
    """
    all_say(base, True)


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
