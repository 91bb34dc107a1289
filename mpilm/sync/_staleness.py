"""What a server does about gradients of old parameters, and how it counts how old they were.

    none            nothing
    scale           the learning rate is divided by the staleness (Zhang et al., arXiv 1511.05950)
    compensate      g + LAMBDA g g (w - w'), a guess at the gradient of the present parameters w from that of the old
                    ones w' (DC-ASGD, Zheng et al., arXiv 1609.08326); a server keeps for every worker what it pulled

A gradient of the present parameters is left as it is by all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mpilm.log import UserError

LAMBDA = 0.04   # of DC-ASGD with a constant, as in the paper's experiments
BINS = 16       # of the histogram: staleness 0, 1, 2-3, 4-7, 8-15, ...


class Rule:
    """Leaves everything as it is.

    Attributes:
        remembers: It needs to know the parameters that a gradient was computed on.
    """

    remembers = False

    def rate(self, staleness: int) -> float:
        """What the learning rate is multiplied by."""
        return 1.0

    def correct(self, gradient: torch.Tensor, masters: torch.Tensor, pulled: torch.Tensor) -> None:
        """Change a gradient in place; `pulled` are the parameters that it was computed on."""


class Scale(Rule):
    """Divides by the staleness."""

    def rate(self, staleness: int) -> float:
        """As Rule."""
        return 1.0 / max(1, staleness)


class Compensate(Rule):
    """Adds the first-order term of a Taylor series, with the square of the gradient for the Hessian."""

    remembers = True

    def correct(self, gradient: torch.Tensor, masters: torch.Tensor, pulled: torch.Tensor) -> None:
        """As Rule."""
        gradient.addcmul_(gradient.square(), masters - pulled, value=LAMBDA)


MENU: dict[str, type[Rule]] = {"none": Rule, "scale": Scale, "compensate": Compensate}


def get(name: str) -> Rule:
    """The rule of that name.

    Raises:
        UserError: There is none; the message lists those there are.
    """
    if name not in MENU:
        raise UserError(f"--sync.staleness_rule {name}: there is no such choice; give one of {', '.join(MENU)}.")
    return MENU[name]()


@dataclass
class Staleness:
    """Of all gradients so far."""

    counts: list[int] = field(default_factory=lambda: [0] * BINS)
    total: int = 0
    most: int = 0

    def note(self, staleness: int) -> None:
        """One more gradient."""
        self.counts[min(staleness.bit_length(), BINS - 1)] += 1
        self.total += staleness
        self.most = max(self.most, staleness)

    @property
    def mean(self) -> float:
        """Zero before the first gradient."""
        return self.total / max(1, sum(self.counts))

    def told(self) -> dict[str, float | dict[str, int]]:
        """As metrics tell it."""
        return {"staleness_mean": self.mean, "staleness_max": self.most, "staleness_histogram": self.histogram()}

    def histogram(self) -> dict[str, int]:
        """Staleness (or its range) -> gradients; ranges without any are left out."""
        return {_range(number): count for number, count in enumerate(self.counts) if count}


def _range(number: int) -> str:
    """Numbers of `number` binary digits.

    >>> _range(0), _range(1), _range(3), _range(BINS - 1)
    ('0', '1', '4-7', '16384-')
    """
    low, high = (1 << number) >> 1, (1 << number) - 1
    return f"{low}-" if number == BINS - 1 else str(low) if low == high else f"{low}-{high}"
