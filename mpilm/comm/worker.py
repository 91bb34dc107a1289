"""One communication thread with a first-in, first-out queue: sums run while the backward pass goes on.

    worker = Worker("gradients")
    worker.submit(collective.reduce, bucket)        # returns at once
    worker.wait()                                   # everything submitted is done, or its error is raised here

The thread is the only one that uses its communicators, so every rank must submit the same calls in the same order.
NumPy and MPI let go of the interpreter lock in additions and waits, which is what makes this overlap with the main
thread. After an error the rest of the queue is not run: other ranks may be in another place by then.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Worker:
    """A daemon thread that runs what it is given, in order.

    Args:
        name: Of the thread, for stack dumps.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._submitted: list[Future[Any]] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Queue function(*args); the future holds its result."""
        future: Future[Any] = Future()
        self._submitted.append(future)
        self._queue.put((future, function, args))
        return future

    def until(self, future: Future[Any]) -> None:
        """Return when what `submit` gave this future for is done; raise its error."""
        future.result()

    def wait(self) -> None:
        """Return when everything submitted so far is done; raise the first error among it."""
        waiting, self._submitted = self._submitted, []
        for future in waiting:
            future.result()

    def close(self) -> None:
        """End the thread after what is queued. Errors that nobody waited for are lost with it."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            future, function, args = item
            try:
                if self._failure:
                    raise self._failure
                future.set_result(function(*args))
            except BaseException as error:  # handed to whoever waits, in the main thread
                self._failure = self._failure or error
                future.set_exception(error)


class Inline:
    """The same interface without a thread, for an MPI that allows calls from one thread only: waiting does the work."""

    def __init__(self) -> None:
        self._submitted: list[_Call] = []

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Queue function(*args); the future holds its result."""
        future: Future[Any] = Future()
        self._submitted.append((future, function, args))
        return future

    def until(self, future: Future[Any]) -> None:
        """Do everything submitted so far, in order, unless that was done already."""
        if not future.done():
            self.wait()

    def wait(self) -> None:
        """Do everything submitted so far, in order."""
        waiting, self._submitted = self._submitted, []
        for future, function, args in waiting:
            future.set_result(function(*args))

    def close(self) -> None:
        """Nothing to end."""
