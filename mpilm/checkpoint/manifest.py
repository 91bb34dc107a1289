"""The manifest: which tensors a checkpoint has, where their runs lie, and the checksum of everything.

    {"format": "mpilm checkpoint", "version": 2, "step": 100, "ranks": 2, "write_s": 8.1, "meta": {...},
     "tensors": {"model.norm.weight": {"shape": [256], "dtype": "F32", "runs": [
         {"file": "rank-00000-part-00.safetensors", "key": "model.norm.weight", "start": 0, "count": 256}]}},
     "files": {"rank-00000-part-00.safetensors": {"bytes": 1224, "xxh3_128": "..."}},
     "sha256": "of all the rest, as JSON with sorted keys and no spaces"}

A run of some columns only, as ranks that share layers hold them, also says which: "columns": [512, 1024]. Files of
version 1 have "sha256".

`loads` believes nothing: after it, file names are plain names, every tensor is covered exactly once by its runs, and
the runs of a file fit into it. So no size that is used later can be larger than the checkpoint's files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import numpy as np

from mpilm.checkpoint import checksum
from mpilm.checkpoint.pieces import CODES, DTYPES, MAX_DIMENSIONS, NAME, Columns, Piece, elements, fit
from mpilm.log import UserError

FILE = "manifest.json"
FORMAT = "mpilm checkpoint"
VERSION = 2
READABLE = (1, VERSION)
KNOWN = "version " + " or ".join(map(str, READABLE))
MAX_BYTES = 1 << 30    # of what is read; millions of runs
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}\.safetensors")



class DamagedError(UserError):
    """A checkpoint that is not what was written; the message names file and reason."""


@dataclass(frozen=True)
class Run:
    """Elements [start, start + count) of a tensor, or of some of its columns, and the file and key they lie under."""

    file: str
    key: str
    start: int
    count: int
    columns: Columns | None = None


@dataclass(frozen=True)
class Tensor:
    """A logical tensor; its runs are sorted and cover it exactly once."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    runs: tuple[Run, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class File:
    """What a file must be; `checksum` is of this kind (checksum.py)."""

    bytes: int
    kind: str
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """All of it. `meta` is the caller's: configuration, fingerprint of the data, facts of the launch. `write_s` is what
    it took to write, in seconds; 0 if that is not known."""

    step: int
    ranks: int
    tensors: dict[str, Tensor]
    files: dict[str, File]
    meta: dict[str, Any]
    write_s: float = 0.0


def record(files: Iterable[tuple[str, Sequence[Piece], int, str]], announced: Iterable[Piece]) -> dict[str, Any]:
    """What one rank wrote, as plain values: (file, its pieces, bytes, checksum); `announced` may hold empty pieces."""
    tensors: dict[str, Any] = {}
    for piece in announced:
        entry = {"shape": list(piece.shape), "dtype": CODES[piece.array.dtype], "runs": []}
        known = tensors.setdefault(piece.name, entry)
        _require_same(piece.name, known, entry)
    written: dict[str, Any] = {}
    for file, pieces, size, found in files:
        written[file] = {"bytes": size, checksum.WRITTEN: found}
        for piece in pieces:
            columns = {} if piece.columns is None else {"columns": list(piece.columns)}
            tensors[piece.name]["runs"].append(
                {"file": file, "key": piece.key, "start": piece.start, "count": piece.array.size, **columns})
    return {"tensors": tensors, "files": written}


def _require_same(name: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    for fact in ("shape", "dtype"):
        if one[fact] != other[fact]:
            raise ValueError(f"pieces of {name} disagree: {fact} {one[fact]} and {other[fact]}")


def dumps(step: int, records: Sequence[dict[str, Any]], meta: dict[str, Any], *, write_s: float = 0.0) -> bytes:
    """The manifest's text from what each rank wrote.

    Raises:
        ValueError: The pieces of all ranks don't cover every tensor exactly once.
    """
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for part in records:
        files.update(part["files"])
        for name, entry in part["tensors"].items():
            known = tensors.setdefault(name, {**entry, "runs": []})
            _require_same(name, known, entry)
            known["runs"] += entry["runs"]
    for name, entry in tensors.items():
        entry["runs"].sort(key=lambda run: (run.get("columns", []), run["start"]))
        _require_cover(name, entry["shape"], _runs(entry))
    body = {"format": FORMAT, "version": VERSION, "step": step, "ranks": len(records), "write_s": write_s,
            "meta": meta,
            "files": files, "tensors": tensors}
    text = _canonical(body)
    return b'%b,"sha256":"%b"}' % (text[:-1], hashlib.sha256(text).hexdigest().encode())


def _runs(entry: dict[str, Any]) -> list[Run]:
    return [Run(str(run["file"]), str(run["key"]), _whole(run["start"]), _whole(run["count"]),
                _columns(run["columns"], entry["shape"]) if "columns" in run else None) for run in entry["runs"]]


def _columns(given: Any, shape: Sequence[int]) -> Columns:
    low, high = map(_whole, given)
    _require(fit((low, high), shape), f"a tensor of shape {shape} has no columns {low} to {high}")
    return low, high


def _require_cover(name: str, shape: Sequence[int], runs: Sequence[Run]) -> None:
    """Every element once: columns side by side, and each of them from the first row to the last, in this order."""
    right = 0
    for columns, those in groupby(runs, key=lambda run: run.columns) if runs else [(None, iter(()))]:
        low, high = columns or (0, shape[-1] if shape else 1)
        if low != right:
            raise ValueError(f"{name}: columns {min(low, right)} to {max(low, right)} are there "
                             f"{'twice' if low < right else 'not at all'}")
        right = high
        _require_rows(name, elements(shape, columns), those)
    if shape and right != shape[-1]:
        raise ValueError(f"{name}: {right} columns instead of {shape[-1]}")


def _require_rows(name: str, size: int, runs: Iterable[Run]) -> None:
    end = 0
    for run in runs:
        if run.start != end:
            raise ValueError(f"{name}: elements {min(run.start, end)} to {max(run.start, end)} are there "
                             f"{'twice' if run.start < end else 'not at all'}")
        end += run.count
    if end != size:
        raise ValueError(f"{name}: {end} elements instead of {size}")


def _canonical(body: dict[str, Any]) -> bytes:
    """What the checksum is of."""
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def loads(text: bytes) -> Manifest:
    """Check and take apart a manifest's text.

    Raises:
        DamagedError: It is not what `dumps` wrote.
        UserError: It is intact, but of a version that this program does not know.
    """
    body = _parsed(text)
    if body.get("format") != FORMAT:
        raise DamagedError(f"is not a manifest of this program (its format is {str(body.get('format'))[:80]!r})")
    claimed, version = body.pop("sha256", None), body.get("version")
    if claimed is None:
        raise DamagedError("was changed after it was written: its checksum is gone")
    if claimed != hashlib.sha256(_canonical(body)).hexdigest():
        also = "" if _readable(version) else f" and its version is {str(version)[:20]!r}, not {KNOWN}"
        raise DamagedError(f"was changed after it was written: its checksum does not match{also}")
    if not _readable(version):
        raise UserError(f"was written in version {str(version)[:20]} of the format, this program reads {KNOWN}. "
                        "Use the version of mpilm that wrote it, or a newer one.")
    try:
        return _checked(body)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DamagedError(f"does not make sense ({type(error).__name__}: {error})") from None


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"is not a manifest: it is not JSON ({error})") from None
    if not isinstance(body, dict):
        raise DamagedError("is not a manifest: it is JSON, but not an object")
    return body


def _checked(body: dict[str, Any]) -> Manifest:
    files = {name: _file(entry) for name, entry in body["files"].items()}
    for name in files:
        _require(FILE_NAME.fullmatch(name), f"{name[:80]!r} is not the name of a file of a checkpoint")
    tensors = {name: _tensor(name, entry) for name, entry in body["tensors"].items()}
    used = dict.fromkeys(files, 0)
    for name, tensor in tensors.items():
        for run in tensor.runs:
            _require(run.file in files, f"{name} lies in {run.file[:80]!r}, which is not listed")
            used[run.file] += run.count * tensor.dtype.itemsize
    for name, total in used.items():
        _require(total <= files[name].bytes, f"{name} of {files[name].bytes} bytes can't hold {total}")
    _require(isinstance(body["meta"], dict), "meta is not an object")
    return Manifest(_whole(body["step"]), _whole(body["ranks"]), tensors, files, body["meta"],
                    _seconds(body.get("write_s", 0.0)))     # versions before this one did not write it


def _readable(version: object) -> bool:
    return type(version) is int and version in READABLE


def _file(entry: dict[str, Any]) -> File:
    kind = next((kind for kind in checksum.KINDS if kind in entry), checksum.WRITTEN)
    return File(_whole(entry["bytes"]), kind, str(entry[kind]))


def _tensor(name: str, entry: dict[str, Any]) -> Tensor:
    _require(NAME.fullmatch(name), f"{name[:80]!r} is not the name of a tensor")
    _require(len(entry["shape"]) <= MAX_DIMENSIONS, f"{name} has too many dimensions")
    shape = tuple(_whole(size) for size in entry["shape"])
    runs = _runs({**entry, "shape": shape})
    _require_cover(name, shape, runs)
    return Tensor(shape, DTYPES[entry["dtype"]], tuple(runs))


def _whole(number: Any) -> int:
    _require(type(number) is int and 0 <= number < 1 << 62, f"{str(number)[:40]} is not a whole number")
    return int(number)


def _seconds(number: Any) -> float:
    _require(type(number) in (int, float) and 0 <= number < 1 << 31, f"{str(number)[:40]} is no time")
    return float(number)


def _require(condition: object, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
