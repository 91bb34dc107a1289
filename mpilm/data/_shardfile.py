"""One shard: an HDF5 file with two contiguous datasets, written once and then only mapped.

    tokens     [num_tokens]     uint16 or uint32, little-endian
    documents  [num_documents]  int64: where, in this shard, documents begin; ascending

HDF5 is asked where the two arrays lie in the file (`dset.id.get_offset()`) and the file is mapped there: reading a
window then costs what NumPy costs, 360,000 windows a second and core against 52,000 through h5py. Opening checks sizes
and attributes only; `data_prep.verify` checks every byte.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpilm.data._files import file_sha256, sync
from mpilm.data._format import FORMAT, VERSION, Index, Shard, damaged
from mpilm.log import UserError
from mpilm.named import named

MAX_ATTRIBUTE_BYTES = 1024


def attributes(index: Index, split: str, number: int, *, first_document: int) -> dict[str, int | str]:
    """What the HDF5 attributes of a shard must say, `checksum` aside."""
    shard = index.splits[split][number]
    return {"format": FORMAT, "version": VERSION, "split": split, "shard": number, "vocab_size": index.vocab_size,
            "end_of_text": index.end_of_text, "tokenizer_sha256": index.tokenizer_sha256,
            "num_tokens": shard.num_tokens, "num_documents": shard.num_documents,
            "first_document": first_document,
            "max_token": shard.max_token}


def write(path: Path, values: dict[str, int | str], chunks: Iterable[np.ndarray], documents: np.ndarray) -> Shard:
    """Write a shard and return its line of the index; the file appears whole or not at all.

    Args:
        path: The file.
        values: Attributes, as `attributes` names them; `max_token` is counted here.
        chunks: The tokens in order, [num_tokens] in all, of the type they are stored in.
        documents: [num_documents] int64 offsets in this shard at which documents begin.
    """
    import h5py

    temporary = path.with_name(path.name + ".tmp")
    checksum, max_token, done = hashlib.sha256(), 0, 0
    with _disk_errors(temporary), h5py.File(temporary, "w", locking=False, alignment_threshold=4096,
                                            alignment_interval=4096) as file:
        tokens: Any = None
        for chunk in chunks:
            if tokens is None:
                tokens = file.create_dataset("tokens", shape=(int(values["num_tokens"]),), dtype=chunk.dtype)
            tokens[done:done + chunk.size] = chunk
            checksum.update(chunk.tobytes())
            max_token = max(max_token, int(chunk.max(initial=0)))
            done += chunk.size
        if done != values["num_tokens"]:
            raise AssertionError(f"{path}: {done} tokens written, {values['num_tokens']} announced")
        file.create_dataset("documents", data=documents.astype("<i8"))
        checksum.update(documents.astype("<i8").tobytes())
        for key, value in {**values, "max_token": max_token, "checksum": checksum.hexdigest()}.items():
            file.attrs[key] = np.bytes_(value) if isinstance(value, str) else np.int64(value)
    sync(temporary)
    shard = Shard(file=path.name, num_tokens=done, num_documents=int(documents.size), max_token=max_token,
                  bytes=temporary.stat().st_size, sha256=file_sha256(temporary))
    os.replace(temporary, path)
    sync(path.parent)
    return shard


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """HDF5 that may not write fails once more when it closes the file, and that hides the first error, which has the
    reason."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError) or reason.errno is None:
            raise
        raise OSError(reason.errno, os.strerror(reason.errno), str(path)) from None


def stored_checksum(path: Path) -> str:
    """The SHA-256 of tokens and documents that a shard carries in its attributes."""
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        return str(_attribute(file, "checksum"))


class Mapped(NamedTuple):
    """A shard in memory: tokens [num_tokens], documents [num_documents] int64, and the mapped file itself, in which the
    tokens begin at byte `begin`."""

    tokens: np.ndarray
    documents: np.ndarray
    file: mmap.mmap
    begin: int


def open_shard(folder: Path, index: Index, split: str, number: int, *, first_document: int) -> Mapped:
    """Check a shard against the index and map it.

    Cheap: the file's size and its HDF5 header are looked at, no token is read.

    Raises:
        UserError: Missing, truncated, foreign, newer or of another dataset; names the file and what to do.
    """
    import h5py

    shard = index.splits[split][number]
    path = folder / shard.file
    check_size(path, shard)
    try:
        with h5py.File(path, "r", locking=False) as file:
            check_attributes(path, file, attributes(index, split, number, first_document=first_document))
            tokens = _locate(file, "tokens", shard.num_tokens, index.dtype, shard.bytes)
            documents = _locate(file, "documents", shard.num_documents, "<i8", shard.bytes)
        mapped = _map(path, shard.bytes)
    except UserError:
        raise
    except Exception as error:  # a damaged header surfaces as any of OSError, KeyError, RuntimeError, ValueError, ...
        if os.strerror(errno.EMFILE) in str(error):
            raise UserError(f"{path}: {os.strerror(errno.EMFILE)}: a rank keeps every shard open. Raise the limit "
                            "(ulimit -n), or encode into larger shards (--shard_mib).") from None
        raise damaged(path, f"not a shard that can be read ({type(error).__name__}: {str(error)[:200]})") from None
    if shard.max_token >= index.vocab_size:
        raise damaged(path, f"holds token {shard.max_token}, but the vocabulary has {index.vocab_size} entries")
    return Mapped(np.frombuffer(mapped, index.dtype, shard.num_tokens, tokens),
                  np.frombuffer(mapped, "<i8", shard.num_documents, documents), mapped, tokens)


def read_tokens(path: Path, shard: Mapped, start: int, count: int) -> np.ndarray:
    """Tokens [start, start + count) in memory of their own; fewer where the file ends before.

    Raises:
        OSError: The file can't be read.
    """
    tokens = np.empty(count, shard.tokens.dtype)
    with named(path), open(path, "rb") as file:
        file.seek(shard.begin + start * tokens.itemsize)
        return tokens[:file.readinto(tokens.data) // tokens.itemsize]


def _map(path: Path, size: int) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)


def check_size(path: Path, shard: Shard) -> None:
    """Raise UserError unless the file is there with the size that the index gives."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, though the index names it. Copy the whole folder, or encode the "
                        "text again.") from None
    if size != shard.bytes:
        state = "truncated" if size < shard.bytes else "too long"
        raise damaged(path, f"{state}: {size:,} bytes, should be {shard.bytes:,}")


def check_attributes(path: Path, file: Any, expected: dict[str, int | str]) -> None:
    """Raise UserError unless the attributes of an open HDF5 file are the expected ones."""
    found = {key: _attribute(file, key) for key in expected}
    if found["format"] != FORMAT:
        raise damaged(path, "not an mpilm shard (its `format` attribute is missing or another)")
    if found["version"] != VERSION:
        raise UserError(f"{path}: written in format version {found['version']}, this mpilm reads version {VERSION}. "
                        "Update mpilm, or encode the text again with this one.")
    for key, value in expected.items():
        if found[key] != value:
            raise damaged(path, f"belongs to another dataset: its {key} is {found[key]}, the index says {value}")


def _attribute(file: Any, key: str) -> int | str | None:
    import h5py

    name = key.encode()
    if not h5py.h5a.exists(file.id, name):
        return None
    if h5py.h5a.open(file.id, name).get_storage_size() > MAX_ATTRIBUTE_BYTES:
        raise ValueError(f"attribute {key} is too large")
    value = file.attrs[key]
    if isinstance(value, bytes):
        return value.decode("ascii", "replace")
    return int(value) if isinstance(value, np.integer) else str(value)[:100]


def _locate(file: Any, name: str, count: int, dtype: str, file_bytes: int) -> int:
    """Where the array lies in the file, once its type, length and storage are as they must be."""
    import h5py

    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"no dataset {name}")
    dset = file[name]
    if not isinstance(dset, h5py.Dataset) or dset.shape != (count,) or dset.dtype != np.dtype(dtype):
        raise ValueError(f"{name} is not an array of {count} values of type {dtype}")
    if dset.chunks is not None or dset.is_virtual or dset.external:
        raise ValueError(f"{name} is not stored in one piece")
    offset = dset.id.get_offset() if count else 0
    if offset is None or offset + count * np.dtype(dtype).itemsize > file_bytes:
        raise ValueError(f"{name} goes beyond the end of the file")
    return int(offset)
