"""Encode text into HDF5 token shards, on as many ranks as mpirun or srun starts.

    mpirun -np 8 python -m data_prep.encode texts/ --tokenizer tokenizer.json --to tokens --validation 0.01

INPUT is a file, a folder or a glob: text and source code, .jsonl, .parquet, each also as .gz or .zst. Killed at any
moment, the same command goes on where it was. The result does not depend on the number of ranks.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep import _job, _sources, _units
from data_prep._progress import Progress
from data_prep._readers import BAD
from mpilm import disk
from mpilm.data._format import INDEX, SPLITS, TOKENIZER, UNFINISHED
from mpilm.launch import command, make_directory, on_root, session
from mpilm.lock import locked
from mpilm.log import UserError, counted, say, warn

if TYPE_CHECKING:
    from mpi4py import MPI

    from data_prep._assemble import Assembly
    from data_prep._encoder import Encoder
    from data_prep._parts import Record


@dataclass(frozen=True)
class Settings:
    """How the text is encoded.

    Args:
        validation: Share of the documents that go to the validation split, chosen by a hash of each.
        field: Name of the field that holds the text in .jsonl and .parquet.
        end_of_text: Token that ends a document; empty: whichever of the usual ones the tokenizer has.
        shard_mib: MiB of tokens in an output file.
        unit_mib: MiB of input that a rank does in one go, and that a kill costs; 0: by the size of the input.
        bad_lines: Whether a line of .jsonl that holds no text ends the work ("stop") or is left out ("skip").
    """

    validation: float = 0.01
    field: str = "text"
    end_of_text: str = ""
    shard_mib: float = 512
    unit_mib: float = 0
    bad_lines: str = "stop"

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        if not 0 <= self.validation < 1:
            raise UserError(f"--validation {self.validation}: give a share of the documents, from 0 to below 1.")
        if not 1e-6 <= self.shard_mib <= 1 << 20:
            raise UserError(f"--shard_mib {self.shard_mib}: give a number of MiB above 0, for example 512.")
        if not 0 <= self.unit_mib <= 1 << 20:
            raise UserError(f"--unit_mib {self.unit_mib}: give a number of MiB, or 0.")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, launch, encode."""
    usual = Settings()
    parser = argparse.ArgumentParser(prog="python -m data_prep.encode", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or glob")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="tokenizer.json")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--validation", type=float, default=usual.validation, metavar="SHARE",
                        help="share of the documents for validation (default %(default)s)")
    parser.add_argument("--field", default=usual.field,
                        help="field of .jsonl and column of .parquet that holds the text (default %(default)s)")
    parser.add_argument("--end_of_text", default=usual.end_of_text, metavar="TOKEN",
                        help="token that ends a document (default: <|endoftext|>, </s> or another usual one)")
    parser.add_argument("--shard_mib", type=float, default=usual.shard_mib, metavar="MIB",
                        help="MiB of tokens in an output file (default %(default)s)")
    parser.add_argument("--unit_mib", type=float, default=usual.unit_mib, metavar="MIB",
                        help="MiB of input that a rank does in one go (default: by the size of the input)")
    add_bad_lines(parser)
    values = vars(parser.parse_args(argv))
    inputs, tokenizer, to = values.pop("inputs"), values.pop("tokenizer"), values.pop("to")
    with session() as world:
        encode(inputs, tokenizer, to, world.comm, settings=Settings(**values), threads=world.threads)


def add_bad_lines(parser: argparse.ArgumentParser) -> None:
    """The option that encode and tokenizer share."""
    parser.add_argument("--bad_lines", choices=("stop", "skip"), default="stop",
                        help="what to do at a line of .jsonl that is not JSON with a text in its field "
                             "(default %(default)s)")


def encode(inputs: Sequence[str | Path], tokenizer: str | Path, to: str | Path, comm: MPI.Comm, *,
           settings: Settings, threads: int = 1, wait_s: float = 5.0) -> Path:
    """Encode inputs into the dataset folder `to`, or go on with it; nothing to do if it is complete.

    Collective over `comm`. Returns the folder.

    Args:
        inputs: Files, folders, globs.
        tokenizer: A tokenizer.json.
        to: Folder for the shards; made where it is missing.
        comm: The ranks that share the work.
        settings: How.
        threads: Threads of this rank.
        wait_s: How long to wait for another process that is writing there.

    Raises:
        UserError: Names what is wrong with an input, the tokenizer, a setting or the folder.
    """
    from data_prep._encoder import Encoder, read_tokenizer

    settings.check()
    folder, started = Path(to), time.monotonic()
    with ExitStack() as stack, _disk_errors(folder):
        on_root(comm, lambda: _lock(stack, folder, wait_s))
        content = on_root(comm, lambda: read_tokenizer(Path(tokenizer)))
        encoder = Encoder(content, str(tokenizer), end_of_text=settings.end_of_text, threads=threads)
        plan = on_root(comm, lambda: _plan(inputs, folder, encoder, settings))
        if plan is None:
            say(f"{folder} is complete, nothing to do")
            return folder
        records = _encode_units(*plan, folder / UNFINISHED, encoder, settings, comm)
        assembly = _write_shards(records, folder, encoder, settings, comm)
        _tell(assembly, records, settings, folder, time.monotonic() - started)
    return folder


@contextmanager
def _disk_errors(folder: Path, needed: str = "") -> Iterator[None]:
    """A full or read-only disk is no bug: say which file, and that the work is not lost."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno in disk.FULL:
            what = f"the disk is full, or your share of it: {disk.free(folder)} are free{needed and f', {needed}'}"
        raise UserError(f"{error.filename or folder}: {what}. When that is mended, run the same command again: it goes "
                        "on where it was.") from None


def _lock(stack: ExitStack, folder: Path, wait_s: float) -> None:
    make_directory(folder, option="to")
    with _disk_errors(folder):
        stack.enter_context(locked(folder, wait_s=wait_s, otherwise="give another --to"))


def _plan(inputs: Sequence[str | Path], folder: Path, encoder: Encoder,
          settings: Settings) -> tuple[list[_units.Unit], dict[int, Record]] | None:
    """All units and the records of those that are done; None if everything is."""
    with _disk_errors(folder):
        sources = _sources.find(inputs)
        unit_bytes = int(settings.unit_mib * 2**20)
        job = _job.Job(tokenizer=encoder.sha256, end_of_text=encoder.end_of_text, validation=settings.validation,
                       field=settings.field, shard_mib=settings.shard_mib, unit_bytes=unit_bytes,
                       bad_lines=settings.bad_lines, sources=sources)
        if _job.is_finished(folder, job):
            _job.discard(folder)
            return None
        units = _units.divide(sources, validation=settings.validation, unit_bytes=unit_bytes)
        records = _job.start(folder, job, token_bytes=int(encoder.dtype[-1]))
    done = f", {len(records):,} of them done already" if records else ""
    size = sum(source.size for source in sources)
    say(f"{counted(len(sources), 'file')}, {size / 1e6:,.1f} MB, in {counted(len(units), 'unit')} of "
        f"work{done}")
    if _units.is_lone_text(sources) and settings.validation:
        say("the input is one document: its end is the validation split")
    return units, {number: record for number, record in records.items() if number < len(units)}


def _encode_units(units: list[_units.Unit], records: dict[int, Record], folder: Path, encoder: Encoder,
                  settings: Settings, comm: MPI.Comm) -> list[Record]:
    """Encode what is not done yet; every unit's record, in order, on every rank."""
    from data_prep._parts import encode_unit

    mine = _units.deal([unit for unit in units if unit.number not in records], comm.size)[comm.rank]
    share = f" (rank 0 of {comm.size})"
    with Progress(f"encoding{share}", total=sum(unit.size for unit in mine), show=comm.rank == 0) as progress:
        new = [encode_unit(unit, folder, encoder, validation=settings.validation, field=settings.field,
                           skip_bad=settings.bad_lines == "skip", advance=progress.advance) for unit in mine]
    everyone: dict[int, Record] = dict(records)
    _wait(comm)
    for of_rank in comm.allgather(new):
        everyone |= {record["unit"]: record for record in of_rank}
    return [everyone[unit.number] for unit in units]


def _write_shards(records: list[Record], folder: Path, encoder: Encoder, settings: Settings,
                  comm: MPI.Comm) -> Assembly:
    """Units' files -> shards, tokenizer and, last of all, the index."""
    from data_prep._assemble import Assembly, write_all
    from mpilm.data._files import sync, write_bytes

    assembly = Assembly(folder, folder / UNFINISHED, records, encoder, shard_bytes=int(settings.shard_mib * 2**20))
    _require_documents(assembly, folder, settings, comm)
    on_root(comm, lambda: _require_room(folder, assembly.bytes_left))
    total = sum(assembly.num_tokens(split) for split in SPLITS) * int(encoder.dtype[-1])
    with Progress("writing shards", total=total // comm.size, show=comm.rank == 0) as progress:
        mine = write_all(assembly, comm.rank, comm.size, progress.advance)
    _wait(comm)
    lines = dict(pair for of_rank in comm.allgather(mine) for pair in of_rank)

    def complete() -> None:
        with _disk_errors(folder):
            write_bytes(folder / TOKENIZER, encoder.content)
            _job.keep(folder)
            index = assembly.index([lines[place] for place in range(len(assembly.shards))])
            write_bytes(folder / INDEX, index.to_bytes())
            sync(folder)
            _job.discard(folder)

    on_root(comm, complete)
    return assembly


def _require_room(folder: Path, needed: int) -> None:
    """Before the disk is filled, and others with it."""
    with _disk_errors(folder, f"and the shards still need {disk.readable(needed)}"):
        disk.require(folder, needed)


def _require_documents(assembly: Assembly, folder: Path, settings: Settings, comm: MPI.Comm) -> None:
    documents = {split: assembly.num_documents(split) for split in SPLITS}
    if documents["train"]:
        return
    on_root(comm, lambda: _job.discard(folder))
    if documents["validation"]:
        raise UserError(f"All {documents['validation']} documents fell to the validation split: give more documents, "
                        f"or a --validation smaller than {settings.validation}.")
    raise UserError("There are no documents in the input: every file or text in it is empty.")


def _tell(assembly: Assembly, records: list[Record], settings: Settings, folder: Path, seconds: float) -> None:
    notes: Counter[str] = Counter()
    for record in records:
        notes.update(record["notes"])
    if notes["empty"]:
        say(f"left out: {counted(notes['empty'], 'empty document')}")
    if notes["undecodable"]:
        say(f"bytes that are not UTF-8 became U+FFFD, in {counted(notes['undecodable'], 'piece')} of text")
    if notes["ended"]:
        warn(f"the token that ends a document is spelled in {counted(notes['ended'], 'piece')} of text, which this "
             "tokenizer does not tell apart: make it a special token of the tokenizer, or name another one with "
             "--end_of_text.")
    tell_bad_lines(notes)
    if settings.validation and not assembly.num_documents("validation"):
        warn(f"the validation split is empty: too few ({counted(assembly.num_documents('train'), 'document')}) for "
             f"--validation {settings.validation}. Give a larger share, or more documents.")
    for split in SPLITS:
        say(f"{split}: {assembly.num_tokens(split):,} tokens in {counted(assembly.num_documents(split), 'document')}")
    say(f"{folder} is complete ({seconds:.1f} s)")


def tell_bad_lines(notes: Counter[str]) -> None:
    """Say how many lines of which files were left out."""
    bad = {key.removeprefix(BAD): count for key, count in sorted(notes.items()) if key.startswith(BAD)}
    if bad:
        most = [f"{count:,} in {file}" for file, count in list(bad.items())[:3]] + ["..."] * (len(bad) > 3)
        warn(f"left out: {counted(sum(bad.values()), 'line')}, not JSON with a text in its field: {', '.join(most)}")


def _wait(comm: MPI.Comm) -> None:
    """Wait for all ranks without using a core: the others may have much left to do. Collective over `comm`."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.01)


if __name__ == "__main__":
    command(main)
