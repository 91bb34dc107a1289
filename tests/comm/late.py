"""A device that is late: what is queued on it happens some time after, in a thread of its stream, as on a GPU.

    late = Late(seed=1)
    a = late.zeros(4, np.float32)
    np.add(a, 1, out=a)             # returns at once
    late.settle()                   # now a is 1

It is there to make mistakes show that a GPU would forgive most of the time. Its memory is apart from what NumPy sees
(an array gives values only through `get`), other processes may open it, and its address can be given to MPI, which then
reads whatever is there at that moment. So whoever forgets an event, or to settle before MPI, computes wrong numbers.

Args of Late: `seed` of the delays; `immediate`: threads that are on no stream of their own work at once, as torch does
on a CPU, and wait themselves where they follow an event; `prompt`: everything works at once, and only arrays are not
NumPy's.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mpilm.comm.devices import HOST
from mpilm.comm.devices._base import STREAMS, Device, Signal
from mpilm.comm.memory import SharedMemoryError
from tests.comm.late_array import LateArray, memory_of

LONGEST_S = 400e-6
SELDOM = 0.5    # of all calls are late


class Event:
    """Something that has happened once `flag` is set."""

    def __init__(self) -> None:
        self.flag, self.at = threading.Event(), 0.0

    def happen(self) -> None:
        self.at = time.perf_counter()
        self.flag.set()


class Stream:
    """A thread that does what it is given, in order and late."""

    def __init__(self, seed: int, name: str) -> None:
        self.random, self.calls = random.Random(seed), queue.SimpleQueue[Callable[[], Any] | None]()
        self.thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while (call := self.calls.get()) is not None:
            if self.random.random() < SELDOM:
                time.sleep(self.random.random() * LONGEST_S)
            call()

    def put(self, call: Callable[[], Any]) -> None:
        self.calls.put(call)

    def record(self) -> Event:
        event = Event()
        self.put(event.happen)
        return event

    def follow(self, event: Event) -> None:
        self.put(event.flag.wait)


class Now:
    """In place of a stream: everything happens at once, in the thread that calls."""

    def put(self, call: Callable[[], Any]) -> None:
        call()

    def record(self) -> Event:
        event = Event()
        event.happen()
        return event

    def follow(self, event: Event) -> None:
        event.flag.wait()


class Late(Device):
    """See the top of the file."""

    torch = "cpu"

    def __init__(self, seed: int = 0, *, immediate: bool = False, prompt: bool = False) -> None:
        self.array = LateArray
        self.streams: dict[str, Any] = {name: Now() if prompt else Stream(seed + number, name)
                                        for number, name in enumerate(STREAMS)}
        self.default = Now() if immediate or prompt else Stream(seed + len(STREAMS), "compute")
        self.local = threading.local()
        weakref.finalize(self, _end, [*self.streams.values(), self.default])

    @property
    def current(self) -> Any:
        return getattr(self.local, "stream", self.default)

    def put(self, call: Callable[[], Any]) -> None:
        """Queue a call."""
        self.current.put(call)

    def empty(self, count, dtype):
        return LateArray(self, np.full(count * np.dtype(dtype).itemsize, 255, np.uint8).view(dtype))    # NaN

    def zeros(self, count, dtype):
        nbytes = count * np.dtype(dtype).itemsize
        descriptor = os.memfd_create("late")
        os.truncate(descriptor, max(1, nbytes))
        memory = np.frombuffer(mmap.mmap(descriptor, max(1, nbytes)), np.uint8)
        array = LateArray(self, memory[:nbytes].view(dtype))
        array.descriptor = descriptor
        weakref.finalize(array, os.close, descriptor)
        return array

    def pinned(self, count, dtype):
        return np.full(count * np.dtype(dtype).itemsize, 255, np.uint8).view(dtype)

    def to_host(self, source, target):
        memory = source.memory
        self.put(lambda: np.copyto(target, memory))

    def to_device(self, source, target):
        memory = target.memory
        self.put(lambda: np.copyto(memory, source))

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[None]:
        before = getattr(self.local, "stream", None)
        self.local.stream = self.streams[name]
        try:
            yield
        finally:
            if before is None:
                del self.local.stream
            else:
                self.local.stream = before

    def record(self):
        return self.current.record()

    def happened(self, event):
        return event.flag.is_set()

    def follow(self, event):
        if event is not None:
            self.current.follow(event)

    def wait(self, event):
        event.flag.wait()

    def stamp(self):
        return self.record()

    def elapsed(self, first, last):
        last.flag.wait()
        return last.at - first.at

    def settle(self):
        self.current.record().flag.wait()

    def squares(self, values, out):
        memory, into = memory_of(values), memory_of(out)
        self.put(lambda: HOST.squares(memory, into))

    def export(self, array):
        return os.getpid(), array.descriptor

    def open(self, handle, count, dtype):
        pid, descriptor = handle
        try:
            mine = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)
        except OSError as error:
            raise SharedMemoryError(str(error)) from None
        memory = np.frombuffer(mmap.mmap(mine, count * np.dtype(dtype).itemsize), dtype)
        os.close(mine)
        return LateArray(self, memory)

    def close(self, array):
        array.memory = None

    def signal(self):
        return LateSignal(self)

    def free_bytes(self):
        return 2**30

    @property
    def uuid(self):
        return f"late-{os.getpid()}"

    @property
    def title(self):
        return "a late device"


class LateSignal(Signal):
    """How often it was recorded, in memory that other processes read."""

    def __init__(self, device: Late) -> None:
        self.device, self.recorded = device, 0
        self.count = device.zeros(1, np.int64)
        self.handle = device.export(self.count)
        self.opened: dict[Any, LateArray] = {}

    def record(self):
        self.recorded += 1
        memory, number = self.count.memory, self.recorded
        self.device.put(lambda: memory.__setitem__(0, number))

    def follow(self, handle, turn):
        if handle not in self.opened:
            self.opened[handle] = self.device.open(handle, 1, np.int64)
        memory = self.opened[handle].memory

        def wait() -> None:
            while memory[0] < turn:
                time.sleep(20e-6)

        self.device.put(wait)


def _end(streams: list[Any]) -> None:
    for stream in streams:
        if isinstance(stream, Stream):
            stream.calls.put(None)
