"""The format of a dataset folder: what the writer writes and every reader checks. Nothing else knows it.

    DIR/index.json            every shard with its counts and the SHA-256 of its file, and a fingerprint of it all
    DIR/tokenizer.json        the tokenizer, as the `tokenizers` library saves it
    DIR/train-00000.h5        tokens [n] uint16 or uint32, documents [d] int64; both contiguous, so they can be mapped
    DIR/validation-00000.h5

The tokens of a split are one stream, cut into shards of equal length (the last one shorter), so a document may go
on in the next shard. `documents` holds the offsets, inside the shard, at which documents begin. Every document ends
with the end-of-text token. The fingerprint is the SHA-256 of the index without it: it names the dataset.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpilm.log import UserError

FORMAT = "mpilm-tokens"
VERSION = 1
INDEX = "index.json"
TOKENIZER = "tokenizer.json"
UNFINISHED = "unfinished"  # folder in which data_prep.encode keeps what it has done so far
SPLITS = ("train", "validation")
MAX_INDEX_BYTES = 256 << 20
MAX_TOKENIZER_BYTES = 256 << 20
MAX_VOCAB_SIZE = 1 << 31
_MAX_COUNT = 1 << 60
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One line of the index: a file and what must be in it. `num_documents` counts those that begin in it."""

    file: str
    num_tokens: int
    num_documents: int
    max_token: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What index.json says: the whole dataset, checked for sense but not yet against the files."""

    vocab_size: int
    end_of_text: int
    tokenizer_sha256: str
    splits: dict[str, list[Shard]]

    @property
    def dtype(self) -> str:
        """Type of a token on disk: two bytes where the vocabulary allows."""
        return token_dtype(self.vocab_size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the index: equal for equal tokens in equal shards."""
        return hashlib.sha256(_canonical(self._body())).hexdigest()

    def first_documents(self, split: str) -> list[int]:
        """For every shard of a split, the number of the first document that begins in it."""
        return list(itertools.accumulate((shard.num_documents for shard in self.splits[split][:-1]), initial=0)
                    if self.splits[split] else ())

    def to_bytes(self) -> bytes:
        """The text of index.json; equal datasets give equal bytes."""
        return json.dumps({**self._body(), "fingerprint": self.fingerprint}, indent=1).encode() + b"\n"

    def _body(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self), "dtype": self.dtype}


def token_dtype(vocab_size: int) -> str:
    """The smallest of the two little-endian token types that holds every id below `vocab_size`."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def shard_name(split: str, number: int) -> str:
    """File name of a shard: `train-00000.h5`."""
    return f"{split}-{number:05d}.h5"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def read_index(directory: str | Path) -> Index:
    """Read and check DIR/index.json.

    Raises:
        UserError: No dataset there, an unfinished one, a damaged, foreign or newer index; says what to do.
    """
    folder = Path(directory)
    path = folder / INDEX
    values = parse_json(path, _read_bounded(folder, path))
    if values.get("format") != FORMAT:
        raise UserError(f"{path}: not the index of an mpilm dataset. {HOW_TO_MAKE}")
    version = values.get("version")
    if version != VERSION:
        raise UserError(f"{path}: written in format version {version!r}, this mpilm reads version {VERSION}. "
                        "Update mpilm, or encode the text again with this one.")
    try:
        index = Index(vocab_size=_count(values, "vocab_size", low=1, high=MAX_VOCAB_SIZE),
                      end_of_text=_count(values, "end_of_text"),
                      tokenizer_sha256=_digest(values, "tokenizer_sha256"),
                      splits=_splits(values.get("splits")))
    except ValueError as error:
        raise damaged(path, str(error)) from None
    if index.fingerprint != values.get("fingerprint"):
        raise damaged(path, "its fingerprint does not fit its content; it was changed after it was written")
    return index


HOW_TO_MAKE = "Make one with: python -m data_prep.encode INPUT... --tokenizer tokenizer.json --to DIR"


def damaged(path: Path, what: str) -> UserError:
    """The error for a file that cannot be used as it is."""
    return UserError(f"{path}: {what}. Copy the file again from where it was made, or encode the text again; "
                     f"`python -m data_prep.verify {path.parent}` checks every file.")


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        UserError: It is something else.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not valid JSON ({str(error)[:100]})") from None
    if not isinstance(values, dict):
        raise damaged(path, "not a JSON object")
    return values


def _read_bounded(folder: Path, path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_INDEX_BYTES + 1)
    except OSError as error:
        raise UserError(_why_no_index(folder, path, error)) from None
    if len(text) > MAX_INDEX_BYTES:
        raise damaged(path, f"larger than {MAX_INDEX_BYTES >> 20} MiB")
    return text


def _why_no_index(folder: Path, path: Path, error: OSError) -> str:
    if not folder.exists():
        return f"{folder}: no such folder. {HOW_TO_MAKE}"
    if (folder / UNFINISHED).exists():
        return f"{folder}: its encoding was not finished. Run the same data_prep.encode command again; it goes on."
    if isinstance(error, FileNotFoundError):
        return f"{folder}: holds no dataset (no {INDEX}). {HOW_TO_MAKE}"
    return f"{path}: cannot be read ({error.strerror})."


def _splits(value: object) -> dict[str, list[Shard]]:
    if not isinstance(value, dict) or set(value) != set(SPLITS):
        raise ValueError(f"`splits` must hold {' and '.join(SPLITS)}")
    splits = {name: [_shard(name, number, entry) for number, entry in enumerate(_list(value[name]))]
              for name in SPLITS}
    for shards in splits.values():
        lengths = [shard.num_tokens for shard in shards]
        if any(length != lengths[0] for length in lengths[:-1]) or (lengths and lengths[-1] > lengths[0]):
            raise ValueError("the shards of a split must be equally long, but for a shorter last one")
    return splits


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError("the shards of a split must be a list")
    return value


def _shard(split: str, number: int, entry: object) -> Shard:
    if not isinstance(entry, dict):
        raise ValueError(f"shard {number} of {split} is not an object")
    if entry.get("file") != shard_name(split, number):  # nothing else: a path in here must not leave the folder
        raise ValueError(f"shard {number} of {split} must be named {shard_name(split, number)}, "
                         f"not {str(entry.get('file'))[:100]!r}")
    return Shard(file=entry["file"], num_tokens=_count(entry, "num_tokens", low=1),
                 num_documents=_count(entry, "num_documents"),
                 max_token=_count(entry, "max_token", high=MAX_VOCAB_SIZE),
                 bytes=_count(entry, "bytes", low=1), sha256=_digest(entry, "sha256"))


def _count(values: dict[str, Any], key: str, *, low: int = 0, high: int = _MAX_COUNT) -> int:
    value = values.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"`{key}` is {str(value)[:100]!r}, not a whole number from {low} to {high}")
    return value


def _digest(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"`{key}` is not a SHA-256 in hexadecimal")
    return value
