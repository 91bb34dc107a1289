"""A menu of ways to turn local gradients into agreed parameters: `--sync.kind allreduce` is sync/allreduce.py.

Every file has one class, named like the file. Adding a synchronizer is adding a file.
"""

from __future__ import annotations

from typing import Any

from mpilm import menu
from mpilm.sync._synchronizer import Synchronizer

__all__ = ["Synchronizer", "get"]


def get(name: str) -> type[Any]:
    """The synchronizer of that name.

    Raises:
        UserError: There is none; the message lists those there are.
    """
    found: type[Any] = menu.get(__name__, name, option="sync.kind")
    return found
