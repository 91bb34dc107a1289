"""What must be the same on all ranks, and may not be where hosts have their own files and command lines."""

from __future__ import annotations

from typing import Any

from mpilm.checkpoint import differences
from mpilm.launch import agree
from mpilm.log import UserError


def require(comm: Any, mine: dict[str, Any], problem: str) -> None:
    """Collective over `comm`.

    Raises:
        UserError: On all ranks, where some rank's is not rank 0's: the `problem`, and every difference.
    """
    differing = differences(comm.bcast(mine), mine)
    agree(comm, UserError(f"{problem}:\n  " + "\n  ".join(differing)) if differing else None)


def require_dataset(comm: Any, path: str, fingerprint: str) -> None:
    """The dataset at `path` has this fingerprint on all ranks; copies on the disks of nodes may be of another state.
    Collective over `comm`.

    Raises:
        UserError: It has not.
    """
    require(comm, {"fingerprint": fingerprint}, f"{path} is another dataset than on rank 0. Copy the same one to the "
                                                "disks of all nodes, or name one that all of them share")
