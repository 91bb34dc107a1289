"""Parts of files -> documents, in pieces that are small enough to be tokenized at once.

    for piece in read(part, field="text", notes=notes):
        piece.text, piece.begins, piece.ends, piece.key

A text file is a document; so are a line of .jsonl and a row of .parquet, whose text is the value of one field. Memory
is bounded whatever the size of a file. Nothing is lost in silence: bytes that are not UTF-8 become U+FFFD and are
counted, and so are empty documents, which are left out; anything else that cannot be read is an error, or, where lines
of .jsonl may be skipped, counted too.

`key` is a hash of how the document begins: equal documents have equal keys, wherever they stand.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from data_prep._cutting import PIECE_BYTES, SEARCH_BYTES, cut_at_or_after, pieces, stream_pieces
from data_prep._sources import Source, of_a_file
from data_prep._units import Part
from mpilm.log import UserError

HEAD_BYTES = 64 << 10
LINE_BYTES = 256 << 20
BATCH_ROWS = 256
BAD = "bad lines in "
SKIP = ", or leave such lines out with --bad_lines skip"
BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


class Piece(NamedTuple):
    """A stretch of a document, and whether the document begins and ends with it."""

    text: str
    begins: bool
    ends: bool
    key: int


def read(part: Part, *, field: str = "text", notes: Counter[str], scratch: Path | None = None, skip_bad: bool = False,
         advance: Callable[[int], None] = lambda done: None) -> Iterator[Piece]:
    """The documents of a part, in order.

    Args:
        part: What to read.
        field: Name of the field that holds the text, in .jsonl and .parquet.
        notes: Counts what happened: `empty` documents, `undecodable` pieces, and `BAD` + file: lines skipped there.
        scratch: Folder for a Parquet file that must be unpacked first.
        skip_bad: Leave out lines of .jsonl that are not JSON, or have no text in `field`.
        advance: Told, now and then, how many more bytes of `part.size` are read.

    Raises:
        UserError: The file changed since it was planned, is damaged or has no such field; names it and where.
    """
    source, done = part.source, 0
    readers: dict[str, Callable[..., Iterator[Piece]]] = {
        "text": _text, "jsonl": partial(_jsonl, skip_bad=skip_bad), "parquet": _parquet}
    reader = readers[source.kind]
    try:
        with open(source.path, "rb") as file, _unpacked(source, file) as stream:
            for piece in reader(part, stream, field, notes, scratch):
                yield piece
                if source.kind != "parquet" and part.start + done < (position := file.tell()) <= part.start + part.size:
                    advance(position - part.start - done)
                    done = position - part.start
            _require_unchanged(source, file)
    except Exception as error:
        if not of_a_file(error):
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # what is full is not the input
            error.filename = str(scratch or tempfile.gettempdir())
            raise
        raise UserError(f"{source.path}: cannot be read to its end ({str(error)[:200]}). Repair or remove it, and "
                        "encode into another folder: this one belongs to the file as it is.") from None
    advance(part.size - done)


def _unpacked(source: Source, file: BinaryIO) -> BinaryIO:
    """The stream to read from: the file, or what is packed in it."""
    _require_unchanged(source, file)
    if not source.packing or not source.size:
        return file
    import pyarrow

    unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(file), source.packing)
    return cast(BinaryIO, io.BufferedReader(unpacked, PIECE_BYTES))


def _require_unchanged(source: Source, file: BinaryIO) -> None:
    about = os.fstat(file.fileno())
    if (about.st_size, about.st_mtime_ns) != (source.size, source.mtime_ns):
        raise UserError(f"{source.path}: changed while it was being encoded. Wait until it is complete, remove the "
                        "output folder and run the same command again.")


def key_of(head: bytes) -> int:
    """64 bits of a hash of the first HEAD_BYTES of a document."""
    return int.from_bytes(hashlib.blake2b(head[:HEAD_BYTES], digest_size=8).digest(), "little")


def _text(part: Part, file: BinaryIO, field: str, notes: Counter[str], scratch: Path | None) -> Iterator[Piece]:
    size, head = part.source.size, file.read(len(BOM.encode()) + HEAD_BYTES)
    if part.source.packing:
        begins, ends, stretches = True, True, stream_pieces(file, held=head)
    else:
        begin, end = (_cut(file, place, size) for place in (part.start, part.stop))
        file.seek(begin)
        begins, ends = part.start == part.document[0], part.stop == part.document[1]
        stretches = stream_pieces(file, end - begin)
    before, key = None, key_of(head.removeprefix(BOM.encode()))
    for stretch in stretches:
        if before is not None:
            yield Piece(_decode(before, begins, notes), begins, False, key)
            begins = False
        before = stretch
    text = _decode(before or b"", begins, notes)
    if text or not (begins and ends):
        yield Piece(text, begins, ends, key)
    else:
        notes["empty"] += 1


def _cut(file: BinaryIO, position: int, size: int) -> int:
    """Where a part really begins or ends that was planned to at `position`."""
    if position in (0, size):
        return position
    file.seek(max(0, position - 2))
    window = file.read(SEARCH_BYTES + 4)
    return max(0, position - 2) + cut_at_or_after(window, min(position, 2))


def _decode(raw: bytes, begins: bool, notes: Counter[str]) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        notes["undecodable"] += 1
        text = raw.decode(errors="replace")
    return text.removeprefix(BOM) if begins else text


def _jsonl(part: Part, file: BinaryIO, field: str, notes: Counter[str], scratch: Path | None, *,
           skip_bad: bool) -> Iterator[Piece]:
    for position, line in _lines(part, file):
        if not line.removeprefix(BOM.encode()).strip():
            continue
        try:
            value = _value(line, field, f"{part.source.path}, at byte {position}", position == 0, notes)
        except UserError:
            if not skip_bad:
                raise
            notes[BAD + part.source.path] += 1
            continue
        yield from _document(value, notes)


def _value(line: bytes, field: str, where: str, first: bool, notes: Counter[str]) -> str | None:
    """The text of a line of JSON; None if it is null."""
    try:
        record = json.loads(_decode(line, first, notes))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a line of JSON ({str(error)[:100]}). Repair or remove the line, and encode into "
                        f"another folder{SKIP}.") from None
    if not isinstance(record, dict) or field not in record:
        raise UserError(f"{where}: no field {field!r}{_others(record)}. Name the text's field with --field{SKIP}.")
    value = record[field]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: a value of type {type(value).__name__}, not text. Name the text's field with "
                        f"--field{SKIP}.")
    return value


def _lines(part: Part, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a part, each with where it begins (in a packed file: in its unpacked text)."""
    position = part.start
    if part.start:
        file.seek(part.start - 1)  # the line that ends just before our first byte leaves us nothing to skip
        position = part.start - 1
        while True:
            skipped = file.readline(1 << 20)
            position += len(skipped)
            if not skipped or skipped.endswith(b"\n"):
                break
    while part.stop < 0 or position < part.stop:
        line = file.readline(LINE_BYTES + 1)
        if len(line) > LINE_BYTES:
            raise UserError(f"{part.source.path}, at byte {position}: a line of more than {LINE_BYTES >> 20} MiB. "
                            "Is this JSON with one record a line? If it is plain text, name it .txt.")
        if not line:
            return
        yield position, line
        position += len(line)


def _others(record: object) -> str:
    return f" among {', '.join(map(repr, list(record)[:8]))}" if isinstance(record, dict) else " (not a JSON object)"


def _parquet(part: Part, file: BinaryIO, field: str, notes: Counter[str], scratch: Path | None) -> Iterator[Piece]:
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile(dir=scratch) as whole:
        if part.source.packing:
            while block := file.read(1 << 20):
                whole.write(block)
            whole.seek(0)
        with pq.ParquetFile(whole if part.source.packing else file) as table:
            if field not in table.schema_arrow.names:
                names = ", ".join(map(repr, table.schema_arrow.names[:8]))
                raise UserError(f"{part.source.path}: no column {field!r} among {names}. Name the text's column with "
                                "--field.")
            _require_text(table.schema_arrow.field(field).type, f"{part.source.path}, column {field!r}")
            groups = list(range(part.start, table.num_row_groups if part.stop < 0 else part.stop))
            for batch in table.iter_batches(BATCH_ROWS, row_groups=groups, columns=[field], use_threads=False):
                for value in batch.column(0).to_pylist():
                    yield from _document(_decode(value, True, notes) if isinstance(value, bytes) else value, notes)


def _require_text(kind: Any, where: str) -> None:
    """Whether values of Arrow's type `kind` are text, or bytes that may be."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not any(fits(kind) for fits in (types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
                                       types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary,
                                       types.is_null)):
        raise UserError(f"{where}: values of type {kind}, not text. Name the text's column with --field.")


def _document(value: str | None, notes: Counter[str]) -> Iterator[Piece]:
    """A text that came as a value, in pieces. None is an empty document."""
    if not value:
        notes["empty"] += 1
        return
    try:
        raw = value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        notes["undecodable"] += 1
        raw = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    key = key_of(raw)
    if len(raw) <= PIECE_BYTES:
        yield Piece(raw.decode(), True, True, key)
        return
    stretches = list(pieces(raw))
    for number, stretch in enumerate(stretches):
        yield Piece(stretch.decode(errors="replace"), number == 0, number == len(stretches) - 1, key)
