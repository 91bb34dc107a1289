"""Pieces of logical tensors, and how a rank's pieces are dealt to files. Pure arithmetic, no MPI.

    Piece("model.embed.weight", (8192, 256), 1000, array)    elements 1000 ... of the flattened tensor

    Piece("model.down.weight", (256, 1024), 0, array, columns=(512, 1024))      those columns of it, flattened alone

In a file a whole tensor has its natural shape under its name; a part of one is flat, under name + range:

    model.norm.weight                       F32 [256]
    model.embed.weight[1000:3000]           F32 [2000]
    model.down.weight[:,512:1024][0:131072] F32 [131072]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

Columns = tuple[int, int]   # first and last + 1
MAX_DIMENSIONS = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,511}")
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"), "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A contiguous run of a logical tensor, or of some of its columns, that is flattened in C order.

    Args:
        name: Of the logical tensor: letters, digits, `_`, `.`, `-`, `/`.
        shape: Of the whole logical tensor.
        start: The run is [start, start + array.size).
        array: Its elements, 1-D; it is read while `save` runs and never afterwards.
        columns: Of a matrix, the first and the last + 1 of those that are flattened; None: all.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    array: np.ndarray
    columns: Columns | None = None

    def __post_init__(self) -> None:
        assert NAME.fullmatch(self.name), f"{self.name!r}: not a tensor's name"
        assert len(self.shape) <= MAX_DIMENSIONS, f"{self.name}: {self.shape}"
        assert self.array.ndim == 1, f"{self.name}: a piece is flat, not {self.array.shape}"
        assert self.array.dtype in CODES, f"{self.name}: {self.array.dtype} has no name in safetensors"
        assert self.columns is None or fit(self.columns, self.shape), f"{self.name}: {self.columns} of {self.shape}"
        assert 0 <= self.start <= self.stop <= self.most, f"{self.name}: [{self.start}:{self.stop}]"

    @property
    def most(self) -> int:
        """Elements of the tensor, or of those columns of it."""
        return elements(self.shape, self.columns)

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + self.array.size

    @property
    def whole(self) -> bool:
        """It is the whole tensor."""
        return self.columns is None and self.array.size == prod(self.shape)

    @property
    def key(self) -> str:
        """Its name inside a file."""
        columns = "" if self.columns is None else f"[:,{self.columns[0]}:{self.columns[1]}]"
        return self.name if self.whole else f"{self.name}{columns}[{self.start}:{self.stop}]"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape inside a file."""
        return self.shape if self.whole else (self.array.size,)


def fit(columns: Columns, shape: Sequence[int]) -> bool:
    """Whether there are such columns."""
    return len(shape) == 2 and 0 <= columns[0] < columns[1] <= shape[1]


def elements(shape: Sequence[int], columns: Columns | None) -> int:
    """Of a tensor, or of some columns of a matrix."""
    return prod(shape) if columns is None else shape[0] * (columns[1] - columns[0])


def deal(pieces: Iterable[Piece], file_bytes: int) -> list[list[Piece]]:
    """One list of pieces a file, none above `file_bytes`; larger pieces are cut, empty ones left out.

    Wide dtypes come first, so that every array in a file is aligned.
    """
    files: list[list[Piece]] = []
    room = 0
    for piece in sorted(_cut(pieces, file_bytes), key=lambda piece: -piece.array.itemsize):
        if not files or piece.array.nbytes > room:
            files.append([])
            room = file_bytes
        files[-1].append(piece)
        room -= piece.array.nbytes
    return files


def _cut(pieces: Iterable[Piece], file_bytes: int) -> Iterator[Piece]:
    for piece in pieces:
        most = max(1, file_bytes // piece.array.itemsize)
        for begin in range(0, piece.array.size, most):
            part = piece.array[begin:begin + most]
            yield piece if part.size == piece.array.size else replace(piece, start=piece.start + begin, array=part)
