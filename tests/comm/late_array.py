"""Arrays of the device in late.py: NumPy's functions queue what they do, and values are seen through `get` only."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.comm.late import Late


@dataclass(eq=False)
class LateArray:
    """A 1-D array of a Late device."""

    device: Late
    memory: np.ndarray
    descriptor: int = -1

    @property
    def dtype(self):
        return self.memory.dtype

    @property
    def size(self):
        return self.memory.size

    @property
    def shape(self):
        return self.memory.shape

    @property
    def ndim(self):
        return self.memory.ndim

    @property
    def nbytes(self):
        return self.memory.nbytes

    @property
    def itemsize(self):
        return self.memory.itemsize

    @property
    def flags(self):
        return SimpleNamespace(c_contiguous=self.memory.flags.c_contiguous)

    def __len__(self):
        return len(self.memory)

    def _like(self, memory):
        view = LateArray(self.device, memory)
        view.base = self     # keeps the descriptor open
        return view

    def view(self, dtype):
        return self._like(self.memory.view(dtype))

    def __getitem__(self, key):
        if not isinstance(key, slice):
            raise TypeError("values of a device are not to be had one by one")
        return self._like(self.memory[key])

    def __setitem__(self, key, value):
        target = self.memory[key] if isinstance(key, slice) else self.memory[key:key + 1]
        source = memory_of(value)
        source = source.copy() if source is value and isinstance(value, np.ndarray) else source
        self.device.put(lambda: np.copyto(target, source))

    def copy(self):
        made = self.device.empty(len(self), self.dtype)
        made[:] = self
        return made

    def get(self, out=None):
        self.device.settle()
        if out is None:
            return self.memory.copy()
        np.copyto(out, self.memory)
        return out

    def set(self, values):
        memory, kept = self.memory, values.copy()
        self.device.put(lambda: np.copyto(memory, kept))

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        if method != "__call__" or options:
            return NotImplemented
        made = out[0] if out else self.device.empty(len(self), self.dtype)
        operands, target = [memory_of(value) for value in inputs], made.memory
        self.device.put(lambda: ufunc(*operands, out=target))
        return made

    def __array__(self, *arguments, **options):
        raise TypeError("NumPy can't look into a device's memory")

    @property
    def __cuda_array_interface__(self):
        return {**self.memory.__array_interface__, "version": 3, "stream": None}

    def __dlpack__(self, **options):
        return self.memory.__dlpack__(**{name: value for name, value in options.items() if name != "stream"})

    def __dlpack_device__(self):
        return self.memory.__dlpack_device__()


def memory_of(value: Any) -> Any:
    """Of a LateArray; anything else is its own."""
    return value.memory if isinstance(value, LateArray) else value
