"""The ways to sum arrays over ranks. A menu: `--sync.collective ring` is collectives/ring.py.

    ring = get("ring")(comm, node)
    gradients = ring.allocate(count, np.float32)       # where this collective wants them to live
    ring.allreduce(gradients)                          # the sum over all ranks, the same bits on each

Every file has one class, named like the file, with the interface of `_base.Collective`. Adding a way is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil

from mpilm.comm.collectives._base import Collective
from mpilm.log import UserError

__all__ = ["Collective", "get", "names"]


def names() -> list[str]:
    """The collectives there are: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str) -> type[Collective]:
    """The class in the file of that name.

    Raises:
        UserError: There is no such file; the message lists those there are.
    """
    if name not in names():
        raise UserError(f"--sync.collective {name}: there is no such collective; choose one of {', '.join(names())}.")
    module = importlib.import_module(f"{__name__}.{name}")
    found: type[Collective] = getattr(module, "".join(word.capitalize() for word in name.split("_")))
    return found
