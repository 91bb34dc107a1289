"""Train a byte-level BPE tokenizer and save it as tokenizer.json.

    python -m data_prep.tokenizer texts/ --vocab_size 32000 --to tokenizer.json

INPUT as for data_prep.encode. Byte-level: every text can be encoded, and decoded to what it was. Of a large input a
sample of documents is taken, the same one every time.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep import _sources, _units
from data_prep._progress import Progress
from data_prep.encode import add_bad_lines, tell_bad_lines
from mpilm.launch import command, on_root, session
from mpilm.log import UserError, say

END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256
SHARES = 64  # a sample comes from at least so many places of the input, if it has them
MAX_VOCAB_SIZE = 1 << 20


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, launch, train on rank 0, save."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.tokenizer", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or glob")
    parser.add_argument("--vocab_size", type=int, required=True, metavar="N", help="tokens in the vocabulary")
    parser.add_argument("--to", required=True, metavar="FILE", help="where to save, for example tokenizer.json")
    parser.add_argument("--field", default="text",
                        help="field of .jsonl and column of .parquet that holds the text (default %(default)s)")
    parser.add_argument("--sample_mib", type=float, default=1024, metavar="MIB",
                        help="learn from about so many MiB of the input (default %(default)s)")
    add_bad_lines(parser)
    options = parser.parse_args(argv)
    with session() as world:
        on_root(world.comm, lambda: train(options.inputs, options.to, vocab_size=options.vocab_size,
                                          field=options.field, sample_mib=options.sample_mib, threads=world.threads,
                                          bad_lines=options.bad_lines))


def train(inputs: Sequence[str | Path], to: str | Path, *, vocab_size: int, field: str = "text",
          sample_mib: float = 1024, threads: int = 1, bad_lines: str = "stop") -> None:
    """Train a tokenizer on the inputs and save it. Not collective.

    Args:
        inputs: Files, folders, globs.
        to: The file to write.
        vocab_size: Entries of the vocabulary, of which one is the end-of-text token and 256 are the bytes.
        field: Name of the text's field in .jsonl and .parquet.
        sample_mib: MiB of input to learn from, at most, about.
        threads: Threads to use.
        bad_lines: "stop" at a line of .jsonl that holds no text, or "skip" it.

    Raises:
        UserError: Names the setting or the input that is wrong.
    """
    from data_prep._encoder import use_threads
    from mpilm.data._files import write_bytes

    if not NUM_BYTES < vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"--vocab_size {vocab_size}: give a number from {NUM_BYTES + 1} (every byte and the end of a "
                        f"text) to {MAX_VOCAB_SIZE:,}.")
    if not sample_mib > 0:
        raise UserError(f"--sample_mib {sample_mib}: give a number of MiB above 0.")
    path = Path(to)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--to {to}: give the name of a file in a folder that exists, for example tokenizer.json.")
    sources = _sources.find(inputs)
    use_threads(threads)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    notes: Counter[str] = Counter()
    tokenizer.train_from_iterator(_texts(sources, field, sample_mib, notes, skip_bad=bad_lines == "skip"), trainer)
    if not notes["texts"]:
        raise UserError("There are no documents in the input: every file or text in it is empty.")
    write_bytes(path, tokenizer.to_str().encode())
    say(f"{path}: {tokenizer.get_vocab_size():,} tokens, learned from {notes['characters'] / 1e6:,.1f} million "
        f"characters in {notes['texts']:,} texts")
    tell_bad_lines(notes)
    if tokenizer.get_vocab_size() < vocab_size:
        say(f"fewer than the {vocab_size:,} asked for: the input is too small to tell more apart")


def _texts(sources: Sequence[_sources.Source], field: str, sample_mib: float, notes: Counter[str], *,
           skip_bad: bool) -> Iterator[str]:
    """The sample: everything if it is small, else a share of every part in a pseudo-random order until it is full."""
    from data_prep._readers import key_of, read

    parts = [part for unit in _units.divide(sources, validation=0) for part in unit.parts]
    left, total = sample_mib * 2**20, sum(part.size for part in parts)
    order: Sequence[int] = range(len(parts))
    of_part = float("inf")
    if left < total:
        order = sorted(order, key=lambda number: key_of(str(number).encode()))
        of_part = left / min(len(parts), SHARES)
    with Progress("reading", total=int(min(left, total)), show=True) as progress:
        for number in order:
            taken = 0
            for piece in read(parts[number], field=field, notes=notes, skip_bad=skip_bad):
                notes["texts"] += 1
                notes["characters"] += len(piece.text)
                taken += len(piece.text)
                progress.advance(len(piece.text))
                yield piece.text
                if taken >= of_part:
                    break
            left -= taken
            if left <= 0 and of_part < float("inf"):
                break


if __name__ == "__main__":
    command(main)
