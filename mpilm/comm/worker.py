"""One communication thread with a first-in, first-out queue: sums run while the backward pass goes on.

    worker = Worker("gradients")
    worker.submit(collective.reduce, bucket)        # returns at once
    worker.wait()                                   # everything submitted is done, or its error is raised here

The thread is the only one that uses its communicators, so every rank must submit the same calls in the same order.
NumPy and MPI let go of the interpreter lock in additions and waits, which is what makes this overlap with the main
thread. After an error the rest of the queue is not run: other ranks may be in another place by then.

What a device does for the thread is queued on its communication stream. A call finds done what its caller had queued
before `submit`; and what the caller queues after `until` or `wait` finds the call's work done.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mpilm.comm.devices import HOST, Device
from mpilm.comm.devices._base import COMMUNICATION


class Call(Future[Any]):
    """function(*args), to be run by another thread.

    Attributes:
        before, after: Events, of the caller's stream and of the one that the call was made on.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], before: Any = None) -> None:
        super().__init__()
        self.function, self.args, self.before, self.after = function, args, before, None


class Worker:
    """A daemon thread that runs what it is given, in order.

    Args:
        name: Of the thread, for stack dumps.
        device: Whose communication stream it works on.
        within: A block around all of its work, on that stream.
    """

    def __init__(self, name: str, device: Device = HOST,
                 within: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.device, self._within = device, within
        self._queue: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._submitted: list[Call] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Call:
        """Queue function(*args); the future holds its result."""
        call = Call(function, args, self.device.record())
        self._submitted.append(call)
        self._queue.put(call)
        return call

    def until(self, call: Call) -> None:
        """Return when what `submit` gave this future for is done; raise its error."""
        call.result()
        self.device.follow(call.after)

    def wait(self) -> None:
        """Return when everything submitted so far is done; raise the first error among it."""
        waiting, self._submitted = self._submitted, []
        for call in waiting:
            self.until(call)

    def close(self) -> None:
        """End the thread after what is queued. Errors that nobody waited for are lost with it."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        with self.device.stream(COMMUNICATION), self._within():
            while (call := self._queue.get()) is not None:
                try:
                    if self._failure:
                        raise self._failure
                    self.device.follow(call.before)
                    result = call.function(*call.args)
                    call.after = self.device.record()
                    call.set_result(result)
                except BaseException as error:  # handed to whoever waits, in the main thread
                    self._failure = self._failure or error
                    call.set_exception(error)


class Inline:
    """The same interface without a thread, for an MPI that allows calls from one thread only: waiting does the work."""

    def __init__(self) -> None:
        self._submitted: list[Call] = []

    def submit(self, function: Callable[..., Any], *args: Any) -> Call:
        """Queue function(*args); the future holds its result."""
        call = Call(function, args)
        self._submitted.append(call)
        return call

    def until(self, call: Call) -> None:
        """Do everything submitted so far, in order, unless that was done already."""
        if not call.done():
            self.wait()

    def wait(self) -> None:
        """Do everything submitted so far, in order."""
        waiting, self._submitted = self._submitted, []
        for call in waiting:
            call.set_result(call.function(*call.args))

    def close(self) -> None:
        """Nothing to end."""
