"""The ways to sum arrays over ranks. A menu: `--sync.collective ring` is collectives/ring.py.

    ring = get("ring")(comm, node)
    gradients = ring.allocate(count, np.float32)       # where this collective wants them to live
    ring.allreduce(gradients)                          # the sum over all ranks, the same bits on each

Every file has one class, named like the file, with the interface of `_base.Collective`. Adding a way is adding a file.
"""

from __future__ import annotations

from mpilm import menu
from mpilm.comm.collectives._base import Collective, Then, nothing_more

__all__ = ["Collective", "Then", "get", "names", "nothing_more"]


def names() -> list[str]:
    """The collectives there are: the files of this folder."""
    return menu.names(__name__)


def get(name: str) -> type[Collective]:
    """The collective of that name.

    Raises:
        UserError: There is none; the message lists those there are.
    """
    found: type[Collective] = menu.get(__name__, name, option="sync.collective", also=["auto"])
    return found
