"""Fewer bytes for the same gradient. A menu: `--sync.compress int8` is compress/int8.py; `none` sends float32.

    total = get("powersgd")(rank=4).over(collective, layout)
    total(buffer)                                   # the sum over all ranks, as far as it can be told in so few bytes

    codec = get("int8")()                           # most ways are codecs
    data = np.empty(codec.size(values.numel()), np.uint8)
    codec.encode(values, data)                      # what goes over the wire
    codec.decode(data, values)                      # what the other side makes of it
    codec.squeeze(values, residual, data)           # with error feedback: what is lost now is sent later

Every file has one class, named like the file, with the interface of `_base.Way`. Adding a way is adding a file.
"""

from __future__ import annotations

from typing import Any

from mpilm import menu
from mpilm.log import UserError
from mpilm.sync.compress._base import Codec, Way

__all__ = ["Codec", "Way", "get", "names"]

UNCOMPRESSED = {"none": "float32"}


def names() -> list[str]:
    """The choices there are: the files of this folder, and `none`."""
    return sorted({*menu.names(__name__), *UNCOMPRESSED} - set(UNCOMPRESSED.values()))


def get(name: str) -> type[Any]:
    """The way of that name: a class of `_base.Way`.

    Raises:
        UserError: There is none; the message lists those there are.
    """
    if name not in names():
        raise UserError(f"--sync.compress {name}: there is no such choice; give one of {', '.join(names())}.")
    found: type[Way] = menu.get(__name__, UNCOMPRESSED.get(name, name), option="sync.compress")
    return found
