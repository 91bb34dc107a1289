"""What of a model's tensors a rank holds that shares layers with others: arithmetic only, no torch.

    slices = Slices(shape, rank=1, size=2)
    slices.parts("layers.0.mlp.down_proj.weight")       # [Part(..., columns=(128, 256))]

A matrix whose outputs are divided (queries, keys, values, gate and up, and both ends of the vocabulary) is held by
rows; one whose inputs are (`o_proj`, `down_proj`), by columns. Vectors are held whole by everyone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from mpilm.model.shape import Shape

BY_COLUMNS = ("o_proj", "down_proj")
Columns = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A run of a tensor, or of some of its columns, that a parameter holds.

    Args:
        tensor: Its name in the world.
        shape: Of the whole tensor.
        start: First element, of the tensor (or of those columns of it) flattened in C order.
        count: Number of elements.
        columns: First and last + 1; None: all.
    """

    tensor: str
    shape: tuple[int, ...]
    start: int
    count: int
    columns: Columns | None = None

    def cut(self, whole: Any) -> Any:
        """The elements of `whole`, an array or tensor of that shape, flat."""
        chosen = whole if self.columns is None else whole[:, slice(*self.columns)]
        return chosen.reshape(-1)[self.start:self.start + self.count]


@dataclass(frozen=True)
class Slices:
    """What rank number `rank` of `size` holds of the model."""

    shape: Shape
    rank: int = 0
    size: int = 1

    def writes(self, parameter: str) -> bool:
        """Whether it is for this rank to save the parameter: of what all hold, one does."""
        return self.rank == 0 or len(self.shape.parameters()[parameter]) > 1

    def parts(self, parameter: str) -> list[Part]:
        """What the parameter holds, in the order of its memory."""
        by_columns = parameter.removesuffix(".weight").endswith(BY_COLUMNS)
        held = self._by_columns if by_columns else self._by_rows
        return [held(tensor, shape) for tensor, shape in self.shape.parts(parameter).items()]

    def _by_rows(self, tensor: str, shape: tuple[int, ...]) -> Part:
        if len(shape) == 1:
            return Part(tensor, shape, 0, shape[0])
        count = prod(shape) // self.size
        return Part(tensor, shape, self.rank * count, count)

    def _by_columns(self, tensor: str, shape: tuple[int, ...]) -> Part:
        rows, columns = shape[0], shape[1] // self.size
        if self.size == 1:
            return Part(tensor, shape, 0, prod(shape))
        return Part(tensor, shape, 0, rows * columns, (self.rank * columns, (self.rank + 1) * columns))

    def runs(self, parameter: str, first: int, count: int) -> Iterator[tuple[int, Part]]:
        """(offset in the run, part) of a run [first, first + count) of the parameter's elements."""
        begin = 0
        for part in self.parts(parameter):
            low, high = max(first, begin), min(first + count, begin + part.count)
            if low < high:
                yield low - first, Part(part.tensor, part.shape, part.start + low - begin, high - low, part.columns)
            begin += part.count
