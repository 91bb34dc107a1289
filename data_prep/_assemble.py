"""Units' token files -> shards. The tokens of a split are those of the units in order, cut every `shard_tokens`.

    unit 0      unit 1            unit 2
    |===========|=================|=====|        the stream of a split
    |--- shard 0 ---|--- shard 1 ---|-2-|        any rank can write any shard

Invariant: which rank writes a shard leaves no trace in it.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from data_prep._encoder import Encoder
from data_prep._parts import Record
from mpilm.data._files import file_sha256, write_json
from mpilm.data._format import SPLITS, Index, Shard, shard_name
from mpilm.data._shardfile import attributes, write

CHUNK_TOKENS = 4 << 20


class Assembly:
    """The shards that the finished units make. Pure arithmetic until `write` is called.

    Args:
        folder: Where the shards go.
        parts: Where the units' files are; records of finished shards are kept there too.
        records: Every unit's, in order.
        encoder: Knows the vocabulary and the type of a token.
        shard_bytes: Bytes of tokens in a shard.
    """

    def __init__(self, folder: Path, parts: Path, records: Sequence[Record], encoder: Encoder, *,
                 shard_bytes: int) -> None:
        self._folder, self._parts, self._encoder = folder, parts, encoder
        self._shard_tokens = max(1, shard_bytes // np.dtype(encoder.dtype).itemsize)
        self._units = [int(record["unit"]) for record in records]
        self._tokens = {split: _starts(records, split, "num_tokens") for split in SPLITS}
        self._documents = {split: _starts(records, split, "num_documents") for split in SPLITS}
        self.shards = [(split, number) for split in SPLITS
                       for number in range(-(-self._tokens[split][-1] // self._shard_tokens))]

    def num_tokens(self, split: str) -> int:
        """Tokens of a split."""
        return self._tokens[split][-1]

    @property
    def bytes_left(self) -> int:
        """Of tokens in shards that are not written yet."""
        left = [(split, number) for split, number in self.shards if not self._record(split, number).exists()]
        tokens = sum(min(self._shard_tokens, self.num_tokens(split) - number * self._shard_tokens)
                     for split, number in left)
        return tokens * np.dtype(self._encoder.dtype).itemsize

    def num_documents(self, split: str) -> int:
        """Documents of a split."""
        return self._documents[split][-1]

    def write(self, split: str, number: int) -> Shard:
        """Write one shard, or find that it is written already, and return its line of the index."""
        path, record = self._folder / shard_name(split, number), self._record(split, number)
        if (shard := _finished(record, path)) is not None:
            return shard
        start = number * self._shard_tokens
        stop = min(start + self._shard_tokens, self.num_tokens(split))
        begins = np.concatenate([np.empty(0, "<i8"), *self._begins(split, start, stop)])
        line = Shard(path.name, stop - start, begins.size, 0, 0, "")
        index = Index(self._encoder.vocab_size, self._encoder.end_of_text, self._encoder.sha256, {split: [line]})
        values = attributes(index, split, 0, first_document=self._first_document(split, start)) | {"shard": number}
        shard = write(path, values, self._chunks(split, start, stop), begins)
        write_json(record, vars(shard))
        return shard

    def _record(self, split: str, number: int) -> Path:
        return self._parts / f"{shard_name(split, number)}.json"

    def index(self, lines: Sequence[Shard]) -> Index:
        """The index of all shards, whose lines come in the order of `shards`."""
        splits = {split: [line for (of, _), line in zip(self.shards, lines, strict=True) if of == split]
                  for split in SPLITS}
        return Index(self._encoder.vocab_size, self._encoder.end_of_text, self._encoder.sha256, splits)

    def _spans(self, split: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Every unit's share of [start, stop): (place of the unit, first token and end in it)."""
        starts = self._tokens[split]
        place = bisect_right(starts, start) - 1
        while start < stop:
            end = min(stop, starts[place + 1])
            if end > start:
                yield place, start - starts[place], end - starts[place]
            start, place = end, place + 1

    def _chunks(self, split: str, start: int, stop: int) -> Iterator[np.ndarray]:
        dtype = np.dtype(self._encoder.dtype)
        for place, first, end in self._spans(split, start, stop):
            path = self._parts / f"{self._units[place]:06d}.{split}.tokens"
            for at in range(first, end, CHUNK_TOKENS):
                count = min(CHUNK_TOKENS, end - at)
                chunk = np.fromfile(path, dtype, count, offset=at * dtype.itemsize)
                if chunk.size != count:
                    raise OSError(f"{path} is shorter than its record says")
                yield chunk

    def _begins(self, split: str, start: int, stop: int) -> Iterator[np.ndarray]:
        for place, first, end in self._spans(split, start, stop):
            begins = self._unit_begins(split, place)
            low, high = np.searchsorted(begins, [first, end])
            yield begins[low:high] + (self._tokens[split][place] - start)

    def _unit_begins(self, split: str, place: int) -> np.ndarray:
        return np.fromfile(self._parts / f"{self._units[place]:06d}.{split}.documents", "<i8")

    def _first_document(self, split: str, start: int) -> int:
        place, first, _ = next(self._spans(split, start, start + 1))
        return self._documents[split][place] + int(np.searchsorted(self._unit_begins(split, place), first))


def _starts(records: Sequence[Record], split: str, key: str) -> list[int]:
    return list(accumulate((int(record[split][key]) for record in records), initial=0))


def _finished(record: Path, path: Path) -> Shard | None:
    """The line of a shard that an earlier call wrote, if it is still what it was."""
    try:
        shard = Shard(**json.loads(record.read_bytes()))
        return shard if file_sha256(path) == shard.sha256 else None
    except (OSError, ValueError, TypeError):
        return None


def write_all(assembly: Assembly, rank: int, size: int, advance: Callable[[int], None]) -> list[tuple[int, Shard]]:
    """Write this rank's share of the shards: (place in `assembly.shards`, line) of each."""
    written = []
    for place, (split, number) in enumerate(assembly.shards):
        if place % size == rank:
            written.append((place, assembly.write(split, number)))
            advance(written[-1][1].bytes)
    return written
