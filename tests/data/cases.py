"""Datasets for tests, written through the format's own writer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpilm.data import _format, _shardfile

TOKENIZER = b"{}"


def write_dataset(folder: Path, documents: Sequence[np.ndarray], *, vocab_size: int = 300, shard_tokens: int = 1000,
                  validation: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Write documents (which end with token 0) into a dataset folder; returns the training split's tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _format.TOKENIZER).write_bytes(TOKENIZER)
    digest = hashlib.sha256(TOKENIZER).hexdigest()
    splits = {"train": _write_split(folder, "train", documents, vocab_size, shard_tokens, digest),
              "validation": _write_split(folder, "validation", validation, vocab_size, shard_tokens, digest)}
    (folder / _format.INDEX).write_bytes(_format.Index(vocab_size, 0, digest, splits).to_bytes())
    return np.concatenate([np.empty(0, np.int64), *documents])


def _write_split(folder: Path, split: str, documents: Sequence[np.ndarray], vocab_size: int, shard_tokens: int,
                 digest: str) -> list[_format.Shard]:
    tokens = np.concatenate([np.empty(0, np.int64), *documents]).astype(_format.token_dtype(vocab_size))
    begins = np.cumsum([0, *(document.size for document in documents)])[:-1]
    shards: list[_format.Shard] = []
    for number, start in enumerate(range(0, tokens.size, shard_tokens)):
        piece = tokens[start:start + shard_tokens]
        inside = begins[(begins >= start) & (begins < start + piece.size)] - start
        line = _format.Shard(_format.shard_name(split, number), piece.size, inside.size, 0, 1, "0" * 64)
        values = _shardfile.attributes(_format.Index(vocab_size, 0, digest, {split: [line]}), split, 0,
                                       first_document=int(np.searchsorted(begins, start)))
        shards.append(_shardfile.write(folder / line.file, values | {"shard": number}, [piece], inside))
    return shards


def documents(count: int, *, vocab_size: int = 300, seed: int = 0, longest: int = 200) -> list[np.ndarray]:
    """Random documents that end with token 0."""
    draw = np.random.default_rng(seed)
    return [np.append(draw.integers(1, vocab_size, draw.integers(0, longest)), 0) for _ in range(count)]
