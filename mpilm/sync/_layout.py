"""Where each parameter lies in the flat buckets: arithmetic on names and sizes.

Parameters fill buckets from the last to the first, because the backward pass produces gradients
in that order and a full bucket can leave at once. A bucket has its decayed parameters first and
the undecayed ones after them; `lay_out` makes buckets of one kind only, which fill sooner.

    bucket 0:  | head.weight             |pad|
    bucket 1:  | blocks.5.down.weight |pad| blocks.5.gate.weight |pad| ...

Every parameter starts at a multiple of BLOCK elements. The gradient norm is summed block by
block, and a segment of a bucket is cut between blocks; so neither the size of the buckets nor
the number of ranks can enter the arithmetic. A bucket has at least one block for each of its owners.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mpilm.comm.order import BLOCK


@dataclass(frozen=True)
class Parameter:
    """A parameter's name, its number of elements, and whether weight decay applies to it; the rows of a matrix."""

    name: str
    count: int
    decay: bool
    rows: int = 1


@dataclass(frozen=True)
class Member:
    """The run [start, start + count) of a bucket that holds the parameter `name`, a matrix of so many rows."""

    name: str
    start: int
    count: int
    rows: int = 1


@dataclass(frozen=True)
class Layout:
    """One bucket: `count` elements, a multiple of BLOCK, and its members in memory order.

    Elements from `undecayed` on, another multiple of BLOCK, are not decayed.
    """

    members: tuple[Member, ...]
    count: int
    undecayed: int

    def zones(self, share: slice) -> list[tuple[slice, bool]]:
        """`share`, cut where weight decay ends; with each part, whether it is decayed. Empty parts are left out."""
        edge = min(max(self.undecayed, share.start), share.stop)
        parts = [(slice(share.start, edge), True), (slice(edge, share.stop), False)]
        return [(part, decay) for part, decay in parts if part.start < part.stop]

    def members_in(self, share: slice) -> list[tuple[Member, int, int]]:
        """The members that reach into `share`, each with the run [start, stop) that they have in common."""
        cuts = [(m, max(share.start, m.start), min(share.stop, m.start + m.count)) for m in self.members]
        return [(member, start, stop) for member, start, stop in cuts if start < stop]

    def runs_in(self, share: slice) -> list[slice]:
        """Where in `share` members are, counted from its beginning; members without a gap between them are one run."""
        runs: list[slice] = []
        for _, start, stop in self.members_in(share):
            if runs and runs[-1].stop == start - share.start:
                runs[-1] = slice(runs[-1].start, stop - share.start)
            else:
                runs.append(slice(start - share.start, stop - share.start))
        return runs

    def gaps(self) -> list[slice]:
        """What lies between members and after the last one."""
        stops = [0, *(member.start + member.count for member in self.members)]
        starts = [*(member.start for member in self.members), self.count]
        return [slice(low, high) for low, high in zip(stops, starts, strict=True)]


def described(parameters: Mapping[str, Tensor], decayed: Collection[str]) -> list[Parameter]:
    """What a layout needs to know of `parameters`; weight decay applies to those named `decayed`."""
    return [Parameter(name, p.numel(), name in decayed, rows=len(p) if p.dim() > 1 else 1)
            for name, p in parameters.items()]


def lay_out(parameters: Iterable[Parameter], bucket_count: int, *, owners: int) -> list[Layout]:
    """Deal parameters, given in the order of the forward pass, to buckets of about `bucket_count` elements.

    A parameter larger than that gets a bucket of its own.
    """
    backward = list(parameters)[::-1]
    decayed = _fill([p for p in backward if p.decay], bucket_count)
    return [_layout(bucket, owners) for bucket in decayed + _fill([p for p in backward if not p.decay], bucket_count)]


def lay_out_modules(parameters: Iterable[Parameter], *, owners: int) -> list[Layout]:
    """A bucket for every module, from the last one to the first; its parameters come and go together.

    A module is what a name begins with, as far as its first number: "layers.3", "0"; without one, its first word.
    """
    modules: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        modules.setdefault(module_of(parameter.name), []).append(parameter)
    return [_layout(sorted(module, key=lambda p: p.decay), owners) for module in reversed(modules.values())]


def module_of(name: str) -> str:
    """The module that a parameter belongs to.

    >>> module_of("layers.3.mlp.down_proj.weight"), module_of("embed_tokens.weight")
    ('layers.3', 'embed_tokens')
    """
    words = name.split(".")
    number = next((place for place, word in enumerate(words) if word.isdecimal()), 0)
    return ".".join(words[:number + 1])


def _fill(backward: list[Parameter], bucket_count: int) -> list[list[Parameter]]:
    buckets: list[list[Parameter]] = []
    for parameter in backward:
        if not buckets or sum(map(_padded, [*buckets[-1], parameter])) > bucket_count:
            buckets.append([])
        buckets[-1].append(parameter)
    return buckets


def _layout(bucket: list[Parameter], owners: int) -> Layout:
    """A bucket of parameters, given from the last in memory to the first, the undecayed ones first."""
    members, start = [], 0
    for parameter in bucket[::-1]:
        members.append(Member(parameter.name, start, parameter.count, parameter.rows))
        start += _padded(parameter)
    return Layout(tuple(members), max(start, owners * BLOCK), sum(_padded(p) for p in bucket if p.decay))


def _padded(parameter: Parameter) -> int:
    return -(-parameter.count // BLOCK) * BLOCK
