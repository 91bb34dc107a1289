"""Which gathered weights are there: a module's own while it computes, and the next one's are on their way.

    forward     | embedding | layer 0 | layer 1 | ... | head |          fetched   0 1 2 ... head
    backward    | head | ... | layer 1 | layer 0 | embedding |          fetched   ... 1 0

In the forward pass a module's weights go when the next module begins; in the backward pass when all its gradients have
come, after which nothing reads them. The last module's stay from forward to backward. A look-up (a module whose input
is whole numbers) does not read its weights in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mpilm.sync._weights import Gathered


class Presence:
    """Fetches and releases.

    Args:
        weights: Of every bucket, from the first module's to the last one's.
        places: id(parameter) -> which of them holds it.
    """

    def __init__(self, weights: Sequence[Gathered], places: Mapping[int, int]) -> None:
        self.weights, self.places = weights, places
        self.lingering: list[int] = []
        self.lookups: set[int] = set()

    def around(self, module: nn.Module, run: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        """run(x, *rest), which is `module`'s forward pass; its weights are there, and will be for the backward pass."""
        needed = sorted({self.places[id(parameter)] for parameter in module.parameters()})
        lookup = not x.is_floating_point()
        if lookup:
            self.lookups.update(needed)
        tied = not lookup and bool(self.lookups.intersection(needed))
        self._enter(needed, needed[-1] + 1 if needed and not tied else -1)
        self.lingering = needed
        y = run(x, *rest)
        if y.requires_grad and not lookup:
            y.register_hook(lambda gradient: self._before_backward(needed, tied=tied))
        return y

    def _before_backward(self, needed: list[int], *, tied: bool) -> None:
        ahead = needed[0] - 1 if needed and not tied else -1
        self._enter(needed, -1 if ahead in self.lookups else ahead)
        self.lingering = needed

    def _enter(self, needed: list[int], ahead: int) -> None:
        for index in self.lingering:
            if index not in needed:
                self.weights[index].release()
        for index in [*needed, ahead]:
            if 0 <= index < len(self.weights):
                self.weights[index].fetch()
        for index in needed:
            self.weights[index].wait()
