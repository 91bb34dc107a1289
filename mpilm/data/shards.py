"""Dataset: the HDF5 shards of one split, opened, checked and memory-mapped as one stream of tokens.

    data = Dataset.open("corpus", split="train")
    data.read(1000, 257)             # tokens 1000 ... 1256, across shard boundaries
    data.windows([0, 5000], 257)     # two such windows at once, [2, 257] int64

Invariant: whatever can be wrong with the files as a whole (missing, truncated, foreign, newer, another tokenizer's) is
found by `open`, without reading the tokens; what is wrong with a token by `scan`, which looks at all of them before the
first step (scan.py). Every byte is checked by data_prep.verify. What happens to the files later (cut short by a copy
that goes on, say) is found by whoever reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mpilm.data._format import MAX_TOKENIZER_BYTES, SPLITS, TOKENIZER, Index, damaged, read_index, shard_name
from mpilm.data._shardfile import Mapped, open_shard, read_tokens
from mpilm.log import UserError


class Dataset:
    """One split of a dataset folder as a stream of tokens. Threads may read from it at the same time.

    Attributes:
        path, split: What was opened.
        num_tokens, num_documents: Of the whole split, 0 where it is empty.
        vocab_size, end_of_text: Every token is below vocab_size; end_of_text ends every document.
        dtype: Type of the tokens on disk, uint16 or uint32.
        fingerprint: SHA-256 that names the dataset, both splits of it.
        tokenizer_path, tokenizer_hash: The tokenizer.json in the folder, and its SHA-256.
        shards: The files, in order.
    """

    def __init__(self, path: Path, split: str, index: Index, shards: list[Mapped]) -> None:
        lines = index.splits[split]
        self.path, self.split = path, split
        self.num_tokens = sum(line.num_tokens for line in lines)
        self.num_documents = sum(line.num_documents for line in lines)
        self.vocab_size, self.end_of_text = index.vocab_size, index.end_of_text
        self.dtype = np.dtype(index.dtype)
        self.fingerprint = index.fingerprint
        self.tokenizer_path, self.tokenizer_hash = path / TOKENIZER, index.tokenizer_sha256
        self.shards = shards
        self._bytes = [line.bytes for line in lines]
        self._shard_tokens = lines[0].num_tokens if lines else 1
        self._first_document = index.first_documents(split)
        self._views: dict[tuple[int, int], np.ndarray] = {}

    @classmethod
    def open(cls, path: str | Path, *, split: str = "train") -> Dataset:
        """Open one split of a dataset folder.

        Raises:
            UserError: Names the file that is missing, damaged or does not belong there, and the remedy.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        folder = Path(path)
        index = read_index(folder)
        check_tokenizer(folder, index)
        shards = [open_shard(folder, index, split, number, first_document=first)
                  for number, first in enumerate(index.first_documents(split))]
        return cls(folder, split, index, shards)

    def num_sequences(self, sequence_length: int) -> int:
        """Sequences of `sequence_length` inputs, each with one target more: (num_tokens - 1) // sequence_length.

        Raises:
            UserError: There is not even one.
        """
        count = (self.num_tokens - 1) // sequence_length
        if count < 1:
            raise UserError(f"{self.path}: its {self.split} split has {self.num_tokens:,} tokens, too few for one "
                            f"sequence of {sequence_length} and its last target. Lower --data.sequence_length, or "
                            f"encode more text (and see --validation of data_prep.encode).")
        return count

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count): [count] of `dtype`; a read-only view where one shard holds them all."""
        if not 0 <= start <= start + count <= self.num_tokens:
            raise IndexError(f"tokens {start} to {start + count} of {self.num_tokens}")
        pieces = []
        while count > 0:
            number, offset = divmod(start, self._shard_tokens)
            self._require_whole([number])
            pieces.append(self.shards[number].tokens[offset:offset + count])
            start, count = start + pieces[-1].size, count - pieces[-1].size
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.empty(0, self.dtype), *pieces])

    def windows(self, starts: np.ndarray | list[int], length: int) -> np.ndarray:
        """Windows of tokens: [len(starts), length] int64, row i being tokens [starts[i], starts[i] + length).

        Raises:
            UserError: A token of them is not in the vocabulary: a shard was damaged since it was written.
        """
        starts = np.asarray(starts, np.int64)
        if starts.size and (starts.min() < 0 or starts.max() + length > self.num_tokens):
            raise IndexError(f"windows of {length} from {starts.min()} to {starts.max()} of {self.num_tokens} tokens")
        numbers = self._touched(starts, length)
        self._require_whole(numbers)
        rows = self._gather(starts, length)
        self._require_whole(numbers)
        if rows.size and int(rows.max()) >= self.vocab_size:
            self._name_bad_token(starts, rows)
        return rows.astype(np.int64)

    def _touched(self, starts: np.ndarray, length: int) -> set[int]:
        """The shards that windows lie in."""
        if len(self.shards) == 1 and starts.size:
            return {0}
        ends = set((np.concatenate([starts, starts + max(0, length - 1)]) // self._shard_tokens).tolist())
        return set(range(min(ends), max(ends) + 1)) if length > self._shard_tokens and ends else ends

    def _require_whole(self, numbers: Iterable[int]) -> None:
        """A mapped file that was cut short has no memory behind its lost end: reading there is a SIGBUS, which nobody
        can catch, or gives zeros. So its size is looked at before and after."""
        for number in numbers:
            size = self.shards[number].file.size()
            if size != self._bytes[number]:
                raise damaged(self.shard_path(number), "was changed while it was being read: "
                              f"{size:,} bytes, should be {self._bytes[number]:,}")

    def _gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The windows in the type on disk. One indexing operation a shard, not a loop over windows."""
        first, last = starts // self._shard_tokens, (starts + length - 1) // self._shard_tokens
        if starts.size and first.min() == last.max():
            return self._view(int(first[0]), length)[starts - first[0] * self._shard_tokens]
        rows = np.empty((starts.size, length), self.dtype)
        for number in np.unique(first[first == last]).tolist():
            mine = np.flatnonzero((first == number) & (last == number))
            rows[mine] = self._view(number, length)[starts[mine] - number * self._shard_tokens]
        for row in np.flatnonzero(first != last).tolist():
            rows[row] = self.read(int(starts[row]), length)
        return rows

    def _view(self, number: int, length: int) -> np.ndarray:
        """Every window of a shard as a row: a view with overlapping rows, no memory of its own."""
        key = (number, length)
        if key not in self._views:
            self._views[key] = np.lib.stride_tricks.sliding_window_view(self.shards[number].tokens, length)
        return self._views[key]

    def _name_bad_token(self, starts: np.ndarray, rows: np.ndarray) -> None:
        row, column = (int(found[0]) for found in np.nonzero(rows >= self.vocab_size))
        number = (int(starts[row]) + column) // self._shard_tokens
        raise self._bad_token(number, rows[row, column])

    def _bad_token(self, number: int, token: int) -> UserError:
        return damaged(self.shard_path(number),
                       f"holds token {token}, but the vocabulary has {self.vocab_size} entries")

    def shard_path(self, number: int) -> Path:
        """The file of a shard."""
        return self.path / shard_name(self.split, number)

    def scan(self, number: int, start: int, count: int) -> int:
        """Look at the tokens [start, start + count) of a shard, read from the file; return how many bytes that were.

        Raises:
            UserError: One is not in the vocabulary, or the file was cut short.
        """
        tokens = read_tokens(self.shard_path(number), self.shards[number], start, count)
        if tokens.size < count:
            raise damaged(self.shard_path(number), "ends before its last token")
        if count and (token := int(tokens.max())) >= self.vocab_size:
            raise self._bad_token(number, token)
        return tokens.nbytes

    def documents(self, start: int, count: int) -> np.ndarray:
        """The number of the document, within the split, of every token in [start, start + count): [count] int64."""
        if not 0 <= start <= start + count <= self.num_tokens:
            raise IndexError(f"tokens {start} to {start + count} of {self.num_tokens}")
        pieces = [np.empty(0, np.int64)]
        while count > 0:
            number, offset = divmod(start, self._shard_tokens)
            size = min(count, self.shards[number].tokens.size - offset)
            self._require_whole([number])
            pieces.append(self._documents(number, offset, size))
            start, count = start + size, count - size
        return np.concatenate(pieces)

    def _documents(self, number: int, offset: int, count: int) -> np.ndarray:
        begins = self.shards[number].documents
        low, high = np.searchsorted(begins, [offset, offset + count])
        inside = begins[low:high] - offset
        if inside.size and (inside[0] < 0 or inside[-1] >= count or (np.diff(inside) <= 0).any()):
            raise damaged(self.shard_path(number), "its document offsets are not in order")
        marks = np.zeros(count, np.int64)
        marks[inside] = 1
        return np.cumsum(marks) + (self._first_document[number] + low - 1)


def check_tokenizer(folder: Path, index: Index) -> None:
    """Raise UserError unless DIR/tokenizer.json is the one the tokens were made with."""
    path = folder / TOKENIZER
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_TOKENIZER_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Copy the tokenizer that encoded {folder} there.") from None
    if hashlib.sha256(text).hexdigest() != index.tokenizer_sha256:
        raise UserError(f"{path}: not the tokenizer that encoded {folder}. Put the right one back, or encode the text "
                        "again with this one.")


def unigram_entropy(dataset: Dataset, *, limit: int = 1 << 26) -> float:
    """Entropy of single tokens, nats per token: the loss of a model that knows only how often each token occurs.

    Over the first `limit` tokens. nan for an empty dataset.

    Raises:
        UserError: As Dataset.windows.
    """
    counts = np.zeros(dataset.vocab_size, np.int64)
    total = min(dataset.num_tokens, limit)
    for start in range(0, total, 1 << 20):
        tokens = dataset.windows([start], min(1 << 20, total - start))
        counts += np.bincount(tokens[0], minlength=dataset.vocab_size)
    if not total:
        return float("nan")
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum())
