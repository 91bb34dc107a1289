"""Buckets leave in one order, whichever is full first: every rank must begin the same sums in the same order."""

from __future__ import annotations

from collections.abc import Iterable


class Departures:
    """What is still awaited, by bucket.

    Args:
        names: (bucket, parameter) of every gradient that is to come; buckets leave in ascending order.
    """

    def __init__(self, names: Iterable[tuple[int, str]]) -> None:
        self.awaited: dict[int, set[str]] = {}
        for index, name in names:
            self.awaited.setdefault(index, set()).add(name)
        self.line = sorted(self.awaited, reverse=True)

    def note(self, index: int, name: str) -> list[int]:
        """The gradient of `name` is in bucket `index`; returns the buckets that leave now."""
        self.awaited[index].discard(name)
        leaving = []
        while self.line and not self.awaited[self.line[-1]]:
            leaving.append(self.line.pop())
        return leaving
