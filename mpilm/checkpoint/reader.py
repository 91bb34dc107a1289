"""Read any run of any tensor of a checkpoint. No MPI, no pickle, no torch.

    reader = Reader("runs/demo/checkpoints/step-00000100")
    reader.step, reader.meta, reader.tensors["model.norm.weight"].shape
    reader.read("model.norm.weight", 0, 256)

Bytes are read into the array that is returned, not mapped: a file that shrinks or a disk that fails is then an error
with a name instead of a SIGBUS.
"""

from __future__ import annotations

import errno
import os
import socket
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.checkpoint import manifest, retention, tensorfile
from mpilm.checkpoint.manifest import DamagedError, Manifest, Run, Tensor
from mpilm.checkpoint.pieces import Columns, elements
from mpilm.checkpoint.rectangles import Rectangle, rectangles
from mpilm.log import UserError

# Errors of the file system that tell of what is on the disk.
DAMAGE = {errno.EIO, errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENOTDIR, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA}


class Reader:
    """A checkpoint directory whose manifest has been checked. The files are checked by `verify`.

    Args:
        path: The checkpoint.
        parsed: Its manifest, if it has been read before.

    Raises:
        DamagedError: The manifest is missing or is not what was written.
        UserError: It is of another version of the format.
    """

    def __init__(self, path: str | Path, parsed: Manifest | None = None) -> None:
        self.path = Path(path)
        self.manifest = parsed or _manifest(self.path / manifest.FILE)
        named = retention.COMPLETE.fullmatch(self.path.name)
        if named and int(named[1]) != self.manifest.step:
            raise DamagedError(f"{self.path / manifest.FILE} is of step {self.manifest.step}: in the wrong place.")
        self.step: int = self.manifest.step
        self.meta: dict[str, Any] = self.manifest.meta
        self.write_s = self.manifest.write_s
        self.tensors: dict[str, Tensor] = self.manifest.tensors
        self._contents: dict[str, dict[str, tensorfile.Stored]] = {}
        self._files = tensorfile.OpenFiles()

    def read(self, name: str, start: int, count: int, columns: Columns | None = None) -> np.ndarray:
        """Elements [start, start + count) of the flattened tensor: a new 1-D array of the tensor's dtype.

        Args:
            columns: Of a matrix, the first and the last + 1 of those that are flattened; None: all.

        Raises:
            DamagedError: A file is not what the manifest says.
            UserError: There is no such tensor, or this host can't read a file.
        """
        if name not in self.tensors:
            raise UserError(f"{self.path}: there is no tensor {name}. It has {_some(self.tensors)}.")
        tensor = self.tensors[name]
        assert 0 <= start <= start + count <= elements(tensor.shape, columns), f"{name}[{start}:{start + count}]"
        values = np.empty(count, tensor.dtype)
        runs, stop = tensor.runs, start + count
        if runs and (runs[0].columns, runs[-1].columns) != (columns, columns):     # they are sorted by columns
            self._put_together(tensor, values, rectangles(tensor.shape, columns, start, count))
            return values
        first = bisect_right(runs, start, key=lambda run: run.start) - 1
        for run in runs[max(first, 0):]:
            low, high = max(start, run.start), min(stop, run.start + run.count)
            if low >= high:
                break
            self._read_run(run, tensor, low, values[low - start:high - start])
        return values

    def _put_together(self, tensor: Tensor, values: np.ndarray, wanted: Sequence[Rectangle]) -> None:
        """Fill `values` from runs of other columns."""
        for run in tensor.runs:
            for stored in rectangles(tensor.shape, run.columns, run.start, run.count):
                for target in wanted:
                    into, out_of = target.within(stored), stored.within(target)
                    if into is not None and out_of is not None:
                        span = np.empty(out_of.span, tensor.dtype)
                        self._read_run(run, tensor, run.start + out_of.offset, span)
                        into.view(values[into.offset:into.offset + into.span])[:] = out_of.view(span)

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Compare size and checksum of these files (default: of all) with the manifest.

        Raises:
            DamagedError: Names the first file that is wrong, and how.
            UserError: This host can't read a file.
        """
        for name in self.manifest.files if files is None else files:
            wanted = self.manifest.files[name]
            try:
                found = tensorfile.checksum_of(self.path / name, wanted.bytes, wanted.kind)
            except (OSError, ValueError) as error:
                raise _unreadable(self.path / name, error) from None
            if found != wanted.checksum:
                raise DamagedError(f"{self.path / name} was changed after it was written: its checksum does not match.")

    def _read_run(self, run: Run, tensor: Tensor, low: int, target: np.ndarray) -> None:
        path = self.path / run.file
        try:
            file = self._files.get(path)
            stored = self._stored(file, run, tensor)
            tensorfile.read_into(file, target, stored.offset + (low - run.start) * tensor.dtype.itemsize)
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from None

    def _stored(self, file: int, run: Run, tensor: Tensor) -> tensorfile.Stored:
        if run.file not in self._contents:
            self._contents[run.file] = tensorfile.contents(file, self.manifest.files[run.file].bytes)
        stored = self._contents[run.file].get(run.key)
        shape = tensor.shape if run.columns is None and run.count == tensor.size else (run.count,)
        if stored is None or stored.dtype != tensor.dtype or stored.shape != shape:
            raise ValueError(f"does not hold {run.key} as the manifest says")
        return stored


def _manifest(path: Path) -> Manifest:
    try:
        file = tensorfile.open_regular(path)
        try:
            size = os.fstat(file).st_size
            if size > manifest.MAX_BYTES:
                raise ValueError(f"of {size} bytes is too large for a manifest")
            text = np.empty(size, np.uint8)
            tensorfile.read_into(file, text, 0)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    try:
        return manifest.loads(text.tobytes())
    except UserError as error:
        raise type(error)(f"{path} {error}") from None


def _unreadable(path: Path, error: OSError | ValueError) -> UserError:
    """What to raise: damage is on the disk; what keeps this host from reading may pass, and no older checkpoint would
    be a remedy."""
    if isinstance(error, ValueError):
        return DamagedError(f"{path} {error}.")
    if isinstance(error, FileNotFoundError):
        if path.parent.is_dir():
            return DamagedError(f"{path} is missing.")
        return UserError(f"{path.parent} is not to be seen on {socket.gethostname()}. Do all nodes share this file "
                         "system, and is it mounted?")
    if error.errno in DAMAGE:
        return DamagedError(f"{path} can't be read: {error.strerror}.")
    return UserError(f"{path} can't be read on {socket.gethostname()}: {error.strerror}. It may be undamaged: when the "
                     "cause is removed, the same command goes on.")


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "") or "none"
