"""Where each parameter lies in the flat buckets: arithmetic on names and sizes.

Parameters fill buckets from the last to the first, because the backward pass produces gradients
in that order and a full bucket can leave at once. A bucket holds either decayed parameters or
undecayed ones, so that the optimizer treats it as one array.

    bucket 0:  | head.weight             |pad|
    bucket 1:  | blocks.5.down.weight |pad| blocks.5.gate.weight |pad| ...

Every parameter starts at a multiple of BLOCK elements. The gradient norm is summed block by
block, and a segment of a bucket is cut between blocks; so neither the size of the buckets nor
the number of ranks can enter the arithmetic. A bucket has at least one block for each of its owners.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mpilm.comm.order import BLOCK


@dataclass(frozen=True)
class Parameter:
    """A parameter's name, its number of elements, and whether weight decay applies to it."""

    name: str
    count: int
    decay: bool


@dataclass(frozen=True)
class Member:
    """The run [start, start + count) of a bucket that holds the parameter `name`."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class Layout:
    """One bucket: `count` elements, a multiple of BLOCK, and its members in memory order."""

    members: tuple[Member, ...]
    count: int
    decay: bool


def lay_out(parameters: Iterable[Parameter], bucket_count: int, *, owners: int) -> list[Layout]:
    """Deal parameters, given in the order of the forward pass, to buckets of about `bucket_count` elements.

    A parameter larger than that gets a bucket of its own.
    """
    backward = list(parameters)[::-1]
    decayed = _fill([p for p in backward if p.decay], bucket_count)
    return [_layout(bucket, owners) for bucket in decayed + _fill([p for p in backward if not p.decay], bucket_count)]


def _fill(backward: list[Parameter], bucket_count: int) -> list[list[Parameter]]:
    buckets: list[list[Parameter]] = []
    for parameter in backward:
        if not buckets or sum(map(_padded, [*buckets[-1], parameter])) > bucket_count:
            buckets.append([])
        buckets[-1].append(parameter)
    return buckets


def _layout(bucket: list[Parameter], owners: int) -> Layout:
    members, start = [], 0
    for parameter in bucket[::-1]:
        members.append(Member(parameter.name, start, parameter.count))
        start += _padded(parameter)
    return Layout(tuple(members), max(start, owners * BLOCK), bucket[0].decay)


def _padded(parameter: Parameter) -> int:
    return -(-parameter.count // BLOCK) * BLOCK
