"""Every token is looked at once, before the first step: one that the vocabulary does not have would otherwise be found
when it is drawn, hours into a run, or never.

The ranks read equal parts of it, in large pieces and not through the mapping, whose pages would count as their memory.
The run's directory remembers the files that were good, by size and time of change, so going on costs nothing:

    runs/demo/tokens.json    {"/data/corpus/train-00000.h5": [536870912, 1764590400000000000], ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mpilm.data._files import write_json
from mpilm.data.shards import Dataset
from mpilm.launch import agree, on_root
from mpilm.log import UserError, say
from mpilm.progress import Work

FILE = "tokens.json"
PIECE_TOKENS = 4 << 20
TOLD_BYTES = 4 << 30    # less is read in a moment


class Piece(NamedTuple):
    """Tokens [start, start + length) of a shard of a split."""

    split: int
    shard: int
    start: int
    length: int


def scan(splits: Sequence[Dataset], comm: Any, directory: str | Path) -> None:
    """Look at every token that `directory` does not know to be good. Collective over `comm`.

    Args:
        splits: The same on all ranks.
        directory: Of the run; what was good is written to it.

    Raises:
        UserError: On all ranks: a token is not in the vocabulary, or a file can't be read; names the file.
    """
    book = Path(directory) / FILE
    stamps = on_root(comm, lambda: _unknown(splits, book))
    if not stamps:
        return
    todo = [(split, shard) for split, shard, _ in stamps]
    size = sum(splits[split].shards[shard].tokens.nbytes for split, shard in todo)
    if size >= TOLD_BYTES:
        say(f"looking at every token once: {size / 1e9:,.1f} GB, {size / comm.size / 1e9:,.1f} GB of it by each rank")
    error = None
    try:
        for piece in islice(_pieces(splits, todo), comm.rank, None, comm.size):
            Work.done += splits[piece.split].scan(piece.shard, piece.start, piece.length)
    except (UserError, OSError) as caught:
        error = caught
    agree(comm, error)
    on_root(comm, lambda: _remember(book, {str(_path(splits[split], shard)): stamp for split, shard, stamp in stamps}))


def _pieces(splits: Sequence[Dataset], todo: list[tuple[int, int]]) -> Iterator[Piece]:
    for split, shard in todo:
        size = splits[split].shards[shard].tokens.size
        for start in range(0, size, PIECE_TOKENS):
            yield Piece(split, shard, start, min(PIECE_TOKENS, size - start))


def _unknown(splits: Sequence[Dataset], book: Path) -> list[tuple[int, int, list[int]]]:
    """Number of the split, number of the shard and its stamp, of those that were not found good as they are now."""
    known = _known(book)
    found = []
    for split, dataset in enumerate(splits):
        for shard in range(len(dataset.shards)):
            path = _path(dataset, shard)
            status = path.stat()    # before it is read: whoever changes it meanwhile makes it unknown again
            stamp = [status.st_size, status.st_mtime_ns]
            if known.get(str(path)) != stamp:
                found.append((split, shard, stamp))
    return found


def _path(dataset: Dataset, shard: int) -> Path:
    return dataset.shard_path(shard).resolve()


def _known(book: Path) -> dict[str, Any]:
    try:
        known = json.loads(book.read_bytes())
    except (OSError, ValueError, RecursionError):   # as good as not there
        return {}
    return known if isinstance(known, dict) else {}


def _remember(book: Path, good: dict[str, list[int]]) -> None:
    write_json(book, {**_known(book), **good})
