"""One unit of work -> token files of its own and, last of all, a record that says it is done.

    unfinished/000012.train.tokens         token ids, as they will stand in the shards
    unfinished/000012.train.documents      int64: where, in that file, documents begin
    unfinished/000012.validation.tokens    and .documents
    unfinished/000012.json                 counts: this unit is done

A kill at any moment leaves a unit with a record, whose files are complete and on disk, or one without, which is encoded
again from its beginning. So no document is lost and none is doubled.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from data_prep._encoder import Encoder
from data_prep._readers import Piece, read
from data_prep._units import Unit
from mpilm.data._files import write_json
from mpilm.data._format import SPLITS

BATCH_CHARACTERS, BATCH_PIECES = 2 << 20, 4096

Record = dict[str, Any]


def encode_unit(unit: Unit, folder: Path, encoder: Encoder, *, validation: float, field: str, skip_bad: bool,
                advance: Callable[[int], None]) -> Record:
    """Encode a unit into its files and return its record.

    Args:
        unit: What to encode.
        folder: Where its files go.
        encoder: Text to tokens.
        validation: Share of the documents that go to the validation split.
        field: Name of the text's field in .jsonl and .parquet.
        skip_bad: Leave out lines of .jsonl that hold no text.
        advance: Told, as it goes, how many more bytes of the unit's size are done.
    """
    notes: Counter[str] = Counter()
    with ExitStack() as stack:
        outputs = {split: stack.enter_context(_Output(folder / f"{unit.number:06d}.{split}", encoder))
                   for split in SPLITS}
        for part in unit.parts:
            for batch in _batches(read(part, field=field, notes=notes, scratch=folder, skip_bad=skip_bad,
                                       advance=advance)):
                for piece, ids in zip(batch, encoder.encode([piece.text for piece in batch]), strict=True):
                    notes["ended"] += encoder.end_of_text in ids
                    outputs[part.split or split_of(piece.key, validation)].add(ids, piece)
        record: Record = {"unit": unit.number, "bytes": unit.size, "notes": dict(notes)}
        record |= {split: outputs[split].finish() for split in SPLITS}
    write_json(folder / f"{unit.number:06d}.json", record)
    return record


def split_of(key: int, validation: float) -> str:
    """The split of a document: by its hash, so the same for equal documents and for any order of the input."""
    return "validation" if key < validation * 2**64 else "train"


def _batches(stream: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in stream:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Output:
    """The token file of one split of a unit, and beside it where its documents begin."""

    def __init__(self, stem: Path, encoder: Encoder) -> None:
        with ExitStack() as stack:
            self._tokens = stack.enter_context(open(f"{stem}.tokens", "wb"))
            self._documents = stack.enter_context(open(f"{stem}.documents", "wb"))
            self._files = stack.pop_all()   # open until the unit is done; on a full disk closing fails too, of each
        self._dtype, self._end = encoder.dtype, encoder.end_of_text
        self._num_tokens = self._num_documents = 0

    def add(self, ids: list[int], piece: Piece) -> None:
        if piece.ends:
            ids.append(self._end)
        if piece.begins:
            self._documents.write(np.array([self._num_tokens], "<i8").tobytes())
            self._num_documents += 1
        self._tokens.write(np.array(ids, self._dtype).tobytes())
        self._num_tokens += len(ids)

    def finish(self) -> dict[str, int]:
        for file in (self._tokens, self._documents):
            file.flush()
            if file.tell():
                os.fsync(file.fileno())
        return {"num_tokens": self._num_tokens, "num_documents": self._num_documents}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
