"""A menu of ways to turn local gradients into agreed parameters: `--sync.kind allreduce` is sync/allreduce.py.

Every file has one class, named like the file. Adding a synchronizer is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from mpilm.log import UserError


def names() -> list[str]:
    """The synchronizers there are: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str) -> Any:
    """The class in the file of that name.

    Raises:
        UserError: There is no such file; the message lists those there are.
    """
    if name not in names():
        raise UserError(f"--sync.kind {name}: there is no such synchronizer; choose one of {', '.join(names())}.")
    return getattr(importlib.import_module(f"{__name__}.{name}"), "".join(word.capitalize() for word in name.split("_")))
