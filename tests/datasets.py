"""A small dataset of real text, as data_prep would write it: modules of the standard library, byte-level tokens."""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from mpilm.data import _format, _shardfile

VOCAB_SIZE = 257
END_OF_TEXT = 256


def small(directory: Path, *, validation: ModuleType = textwrap, template: Any = None) -> Path:
    """Write a training split of about 60,000 tokens and a validation split of about 20,000; returns `directory`. The
    tokenizer has the `template` for others; nothing here is encoded by it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _bytes_only()
    others = Tokenizer.from_str(tokenizer.to_str())
    if template is not None:
        others.post_processor = template
    others.save(str(directory / _format.TOKENIZER))
    digest = hashlib.sha256((directory / _format.TOKENIZER).read_bytes()).hexdigest()
    shards = {split: [_write(directory, split, digest, [np.array(tokenizer.encode(inspect.getsource(module)).ids)
                                                        for module in modules])]
              for split, modules in {"train": (inspect, ), "validation": (validation, )}.items()}
    index = _format.Index(VOCAB_SIZE, END_OF_TEXT, digest, shards)
    (directory / _format.INDEX).write_bytes(index.to_bytes())
    return directory


def _bytes_only() -> Tokenizer:
    """One token a byte and one for the end of a text."""
    names = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = Decoder()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def _write(directory: Path, split: str, digest: str, texts: list[np.ndarray]) -> _format.Shard:
    documents = [np.append(text, END_OF_TEXT).astype("<u2") for text in texts]
    starts = np.cumsum([0] + [len(document) for document in documents])[:-1]
    tokens = np.concatenate(documents)
    sketch = _format.Shard(_format.shard_name(split, 0), len(tokens), len(starts), 0, 1, "0" * 64)
    index = _format.Index(VOCAB_SIZE, END_OF_TEXT, digest, {"train": [sketch], "validation": [sketch]})
    values = _shardfile.attributes(index, split, 0, first_document=0)
    return _shardfile.write(directory / _format.shard_name(split, 0), values, [tokens], starts)


def for_all(comm, directory):
    """`small`, written by rank 0; returns when all ranks see it."""
    if comm.rank == 0:
        small(directory)
    comm.Barrier()
    return directory
