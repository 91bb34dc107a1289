"""Check every byte of a dataset folder against its index and its checksums.

    python -m data_prep.verify tokens

Ends with exit code 0 if all is well; otherwise names every file that is not what it was when it was written. Under
mpirun the ranks share the shards.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep._progress import Progress
from mpilm.launch import command, session
from mpilm.log import UserError, counted, say

if TYPE_CHECKING:
    import numpy as np
    from mpi4py import MPI

    from mpilm.data._format import Index

CHUNK = 4 << 20

def main(argv: Sequence[str] | None = None) -> None:
    """Parse, launch, verify."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", help="dataset folder")
    options = parser.parse_args(argv)
    with session() as world:
        say(verify(options.directory, world.comm))


def verify(directory: str | Path, comm: MPI.Comm) -> str:
    """Check a dataset folder and return a line that says what was checked. Collective over `comm`.

    Raises:
        UserError: Names every damaged file, on all ranks.
    """
    from mpilm.data._format import SPLITS, read_index
    from mpilm.data.shards import check_tokenizer

    folder = Path(directory)
    index = read_index(folder)
    shards = [(split, number) for split in SPLITS for number in range(len(index.splits[split]))]
    mine = shards[comm.rank::comm.size]
    problems = _errors(check_tokenizer, folder, index) if comm.rank == 0 else []
    total = sum(index.splits[split][number].bytes for split, number in mine)
    with Progress("verifying", total=total, show=comm.rank == 0) as progress:
        for split, number in mine:
            problems += _errors(check_shard, folder, index, split, number)
            progress.advance(index.splits[split][number].bytes)
    found = [problem for of_rank in comm.allgather(problems) for problem in of_rank]
    if found:
        raise UserError("\n".join(sorted(found)))
    tokens = sum(shard.num_tokens for lines in index.splits.values() for shard in lines)
    return (f"{folder}: {counted(len(shards), 'shard')}, {tokens:,} tokens, all as written; "
            f"fingerprint {index.fingerprint}")


def _errors(check: object, *args: object) -> list[str]:
    assert callable(check)
    try:
        check(*args)
    except UserError as error:
        return [str(error)]
    return []


def check_shard(folder: Path, index: Index, split: str, number: int) -> None:
    """Raise UserError unless a shard is, byte for byte, what was written, and what is in it makes sense."""
    from mpilm.data._files import file_sha256
    from mpilm.data._format import damaged
    from mpilm.data._shardfile import check_size, open_shard, stored_checksum

    shard = index.splits[split][number]
    path = folder / shard.file
    check_size(path, shard)
    if file_sha256(path) != shard.sha256:
        raise damaged(path, "damaged: its SHA-256 is not the one in the index")
    first = index.first_documents(split)[number]
    tokens, documents, *_ = open_shard(folder, index, split, number, first_document=first)
    if _checksum(tokens, documents) != stored_checksum(path):
        raise damaged(path, "damaged: its content does not fit its `checksum` attribute")
    if problem := _nonsense(tokens, documents, max_token=shard.max_token, end_of_text=index.end_of_text):
        raise damaged(path, problem)


def _checksum(tokens: np.ndarray, documents: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in (tokens, documents):
        for at in range(0, array.size, CHUNK):
            digest.update(array[at:at + CHUNK].tobytes())
    return digest.hexdigest()


def _nonsense(tokens: np.ndarray, documents: np.ndarray, *, max_token: int, end_of_text: int) -> str:
    """What contradicts itself in a shard, though its checksums fit."""
    import numpy as np

    largest = max(int(tokens[at:at + CHUNK].max()) for at in range(0, tokens.size, CHUNK))
    if largest != max_token:
        return f"its largest token is {largest}, the index says {max_token}"
    if documents.size and ((np.diff(documents, prepend=-1) <= 0).any() or documents[-1] >= tokens.size):
        return "its document offsets are not in order"
    if (tokens[documents[documents > 0] - 1] != end_of_text).any():
        return "a document in it does not end with the end-of-text token"
    return ""


if __name__ == "__main__":
    command(main)
