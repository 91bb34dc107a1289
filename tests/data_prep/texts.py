"""Texts for tests, and the same documents read back from a dataset."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard
from tokenizers import Tokenizer

from data_prep import tokenizer
from mpilm.data.shards import Dataset

WORDS = ["one", "two", "three", "Ünïcode", "漢字", "שלום", "🙂", "e\u0301", "\u200d", "def", "f(x):\n", "   return",
         "x\n\n\t", "end\r\n", "", "<|endoftext|>", "\0"]
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def some(count: int, *, length: int = 40) -> list[str]:
    """Different documents of different lengths."""
    return [" ".join(WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(number % length + 1))
            + f" {number}" for number in range(count)]


def write(folder: Path, documents: Sequence[str], kind: str, *, packing: str = "", files: int = 3) -> Path:
    """Write documents as files of a kind; text gets a file each. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "txt":
        for number, text in enumerate(documents):
            (folder / f"{number:06d}.txt{packing}").write_bytes(PACKINGS[packing](text.encode()))
        return folder
    for number in range(files):
        share = documents[number * len(documents) // files:(number + 1) * len(documents) // files]
        raw = jsonl(share) if kind == "jsonl" else parquet(share)
        (folder / f"{number:03d}.{kind}{packing}").write_bytes(PACKINGS[packing](raw))
    return folder


def jsonl(documents: Sequence[str | None]) -> bytes:
    """JSON lines with a field `text` and another one."""
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in documents).encode()


def parquet(documents: Sequence[str | None], *, rows: int = 7) -> bytes:
    """A Parquet file with row groups of a few rows."""
    table = pyarrow.table({"id": list(range(len(documents))), "text": pyarrow.array(documents, pyarrow.string())})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, row_group_size=rows)
    return sink.getvalue().to_pybytes()


def train(folder: Path, documents: Sequence[str]) -> Path:
    """A small tokenizer that has seen these documents."""
    write(folder / "sample", documents, "txt")
    tokenizer.train([folder / "sample"], folder / "tokenizer.json", vocab_size=400)
    return folder / "tokenizer.json"


def decoded(folder: Path, split: str = "train") -> list[str]:
    """The documents of a split, decoded; checks on the way that the end-of-text token ends each."""
    data = Dataset.open(folder, split=split)
    decoder = Tokenizer.from_file(str(data.tokenizer_path))
    tokens, numbers = data.read(0, data.num_tokens), data.documents(0, data.num_tokens)
    texts = []
    for number in range(data.num_documents):
        ids = tokens[numbers == number].tolist()
        assert ids.pop() == data.end_of_text
        assert data.end_of_text not in ids
        texts.append(decoder.decode(ids, skip_special_tokens=False))
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, but for the record of where it was made from."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "job.json"}
