"""Inputs -> units of work, and units -> ranks. Arithmetic on names and sizes; nothing is decoded here.

A unit is what one rank does in one go and what is done again after a kill: a run of small files, or a range of a large
one (bytes of text or JSON lines, row groups of Parquet; a compressed file cannot be entered in the middle).

Invariant: the units depend on the inputs only, so the result does not depend on who encodes which.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from data_prep._sources import Source, of_a_file
from mpilm.log import UserError

MIB = 1 << 20


@dataclass(frozen=True)
class Part:
    """A range of one file: bytes of text or lines, row groups of Parquet, everything (0 to -1) of a packed file.

    `document` is the range of bytes of which a text file makes one document; `split` is set where that range decides
    the split, not the content. `size` is what it costs to read, in bytes of input.
    """

    source: Source
    start: int
    stop: int
    size: int
    document: tuple[int, int] = (0, -1)
    split: str = ""


@dataclass(frozen=True)
class Unit:
    """Parts that one rank encodes one after the other."""

    number: int
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(part.size for part in self.parts)


def divide(sources: Sequence[Source], *, validation: float, unit_bytes: int = 0) -> list[Unit]:
    """All inputs as units, in order.

    A single text file is a single document, which no hash can divide into two splits: then its end is the validation
    split.

    Args:
        sources: What to read, in the order of the output.
        validation: Share of the validation split.
        unit_bytes: Bytes of a unit; 0: chosen by the size of the input.
    """
    unit_bytes = unit_bytes or unit_size(sum(source.size for source in sources))
    if is_lone_text(sources) and validation:
        return _numbered([part] for part in _lone(sources[0], validation, unit_bytes))
    return _numbered(_grouped(sources, unit_bytes))


def unit_size(total: int) -> int:
    """Bytes of a unit for so many bytes of input: enough units for many ranks, few enough for a file system."""
    return max(min(32 * MIB, max(MIB, total // 256)), total // 4096)


def is_lone_text(sources: Sequence[Source]) -> bool:
    """Whether the whole input is one text that can be entered in the middle."""
    return len(sources) == 1 and sources[0].kind == "text" and not sources[0].packing


def _numbered(groups: Iterator[list[Part]] | Sequence[list[Part]]) -> list[Unit]:
    return [Unit(number, tuple(parts)) for number, parts in enumerate(groups)]


def _grouped(sources: Sequence[Source], unit_bytes: int) -> Iterator[list[Part]]:
    group: list[Part] = []
    size = 0
    for source in sources:
        ranges = _ranges(source, unit_bytes)
        if len(ranges) > 1:
            if group:
                yield group
            yield from ([part] for part in ranges)
            group, size = [], 0
            continue
        group += ranges
        size += source.size
        if size >= unit_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _ranges(source: Source, unit_bytes: int) -> list[Part]:
    if source.packing:
        return [Part(source, 0, -1, source.size)]
    if source.kind == "parquet":
        return [Part(source, 0, -1, source.size)] if source.size <= unit_bytes else _row_groups(source, unit_bytes)
    return _bytes(source, 0, source.size, unit_bytes)


def _bytes(source: Source, low: int, high: int, unit_bytes: int, split: str = "") -> list[Part]:
    """[low, high) of a file, one document if it is text, in ranges of about unit_bytes."""
    count = max(1, -(-(high - low) // unit_bytes))
    cuts = [low + number * (high - low) // count for number in range(count + 1)]
    return [Part(source, start, stop, stop - start, (low, high), split)
            for start, stop in pairwise(cuts)]


def _lone(source: Source, validation: float, unit_bytes: int) -> list[Part]:
    cut = max(0, min(source.size, round(source.size * (1 - validation))))
    return (_bytes(source, 0, cut, unit_bytes, split="train")
            + _bytes(source, cut, source.size, unit_bytes, split="validation"))


def _row_groups(source: Source, unit_bytes: int) -> list[Part]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as file:
            about = file.metadata
            sizes = [about.row_group(number).total_byte_size for number in range(about.num_row_groups)]
    except Exception as error:
        if not of_a_file(error):
            raise
        raise UserError(f"{source.path}: not a Parquet file that can be read ({error}). Repair or remove it.") from None
    total = sum(sizes) or 1
    parts: list[Part] = []
    start = read = 0
    for number, size in enumerate(sizes):
        read += size
        if read * source.size // total >= unit_bytes or number == len(sizes) - 1:
            parts.append(Part(source, start, number + 1, read * source.size // total))
            start, read = number + 1, 0
    return parts or [Part(source, 0, -1, source.size)]


def deal(units: Sequence[Unit], size: int) -> list[list[Unit]]:
    """Units to ranks by size: the largest first, each to the rank that has least so far. [size] lists."""
    hands: list[list[Unit]] = [[] for _ in range(size)]
    loads = [(0, rank) for rank in range(size)]
    for unit in sorted(units, key=lambda unit: (-unit.size, unit.number)):
        load, rank = heapq.heappop(loads)
        hands[rank].append(unit)
        heapq.heappush(loads, (load + unit.size, rank))
    return hands
