"""A menu is a folder of choices: the name you type is the file you open.

    get("mpilm.comm.collectives", "ring", option="sync.collective")     # class Ring of collectives/ring.py

Every file of the folder has one class, named like the file; files that begin with an underscore are private helpers.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

from mpilm.log import UserError


def names(package: str) -> list[str]:
    """The choices there are: the public files of the folder."""
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path)
                  if not module.name.startswith("_") and not module.ispkg)


def get(package: str, name: str, *, option: str, also: Sequence[str] = ()) -> Any:
    """The class in the file of that name.

    Args:
        option: What it was given to.
        also: What that takes besides.

    Raises:
        UserError: There is no such file; the message lists those there are.
    """
    if name not in names(package):
        choices = ", ".join([*also, *names(package)])
        raise UserError(f"--{option} {name}: there is no such choice; give one of {choices}.")
    module = importlib.import_module(f"{package}.{name}")
    return getattr(module, "".join(word.capitalize() for word in name.split("_")))


def options(choice: type[Any], section: object) -> dict[str, Any]:
    """What an entry takes of a section of the configuration: what its OPTIONS name."""
    return {name: getattr(section, name) for name in choice.OPTIONS}
