"""Where arrays live and what works on them. A menu: `--run.device cuda` is devices/cuda.py.

    device = get("cuda")(0)
    bucket = device.zeros(count, np.float32)        # an array that NumPy's functions take
    np.add(bucket, other, out=bucket)               # queued on the stream that this thread uses; it may happen later
    device.settle()                                 # it has happened: MPI may have the memory

Every file has one class, named like the file, with the interface of `_base.Device`.
"""

from __future__ import annotations

from collections.abc import Callable

from mpilm import menu
from mpilm.comm.devices._base import ROW, Array, Device
from mpilm.comm.devices.host import Host

__all__ = ["HOST", "ROW", "Array", "Device", "get", "names"]

HOST = Host()


def names() -> list[str]:
    """The kinds of device there are: the files of this folder."""
    return menu.names(__name__)


def get(name: str) -> Callable[[int], Device]:
    """The kind of device of that name, of which (index) is one.

    Raises:
        UserError: There is none; the message lists those there are.
    """
    found: Callable[[int], Device] = menu.get(__name__, name, option="run.device")
    return found
