"""A tokenizer.json from the `tokenizers` library, as encoding needs it: text -> token ids, nothing added, nothing cut.

Text that spells a special token ("<|endoftext|>") is encoded as ordinary text: a document cannot end itself, unless the
tokenizer has that token as an ordinary one, which `encode` counts and tells.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from mpilm.data import tokenizer
from mpilm.data._format import MAX_TOKENIZER_BYTES, MAX_VOCAB_SIZE, token_dtype
from mpilm.log import UserError

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]")
NOBODY_KNOWS = "\U0010fffd"    # a character of private use
HOW_TO_MAKE = "Make one with: python -m data_prep.tokenizer INPUT... --vocab_size 32000 --to tokenizer.json"


class Encoder:
    """Encodes batches of texts on `threads` threads of the tokenizers library.

    Args:
        content: A tokenizer.json.
        name: The file it came from, for messages.
        end_of_text: Name of the token that ends a document; empty: whichever of the usual ones there is.
        threads: Threads to encode on.

    Attributes:
        content, sha256: The file's bytes and their hash.
        vocab_size: Every id is below it.
        end_of_text: Id of the token that ends a document.
        dtype: What a token is stored as.
    """

    def __init__(self, content: bytes, name: str, *, end_of_text: str = "", threads: int = 1) -> None:
        use_threads(threads)
        from tokenizers import Tokenizer

        self.content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = tokenizer.settle(Tokenizer.from_buffer(content))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"--tokenizer {name}: not a tokenizer.json of the `tokenizers` library "
                            f"({str(error)[:200]}). {HOW_TO_MAKE}") from None
        self.name = name
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary or max(vocabulary.values()) >= MAX_VOCAB_SIZE:
            raise UserError(f"--tokenizer {name}: its vocabulary is empty or too large. {HOW_TO_MAKE}")
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text = _end_of_text(name, vocabulary, end_of_text)
        self.dtype = token_dtype(self.vocab_size)
        self._drops = self._leaves_out_what_it_does_not_know()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of every text.

        Raises:
            UserError: The tokenizer has none for something in them.
        """
        encode = self._tokenizer.encode_batch if self._drops else self._tokenizer.encode_batch_fast    # has no offsets
        try:
            found = encode(texts, add_special_tokens=False)
            if self._drops:
                for text, encoding in zip(texts, found, strict=True):
                    _require_covered(text, encoding.offsets)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"--tokenizer {self.name}: it cannot encode this text ({str(error)[:200]}). It needs a "
                            f"token for what it does not know, or bytes as its alphabet. {HOW_TO_MAKE}") from None
        return [encoding.ids for encoding in found]

    def _leaves_out_what_it_does_not_know(self) -> bool:
        """BPE without a token for that says nothing; other models raise an error."""
        from tokenizers.models import BPE

        model = self._tokenizer.model
        return (isinstance(model, BPE) and model.unk_token is None
                and not self._tokenizer.encode(NOBODY_KNOWS, add_special_tokens=False).ids)


def _require_covered(text: str, offsets: Sequence[tuple[int, int]]) -> None:
    """Whether every character but white space is in some token."""
    end = 0
    for start, stop in [*offsets, (len(text), len(text))]:
        if missing := text[end:start].strip():
            raise ValueError(f"it has no token for {missing[:8]!r}")
        end = max(end, stop)


def use_threads(threads: int) -> None:
    """Let the tokenizers library use so many threads. Counts only before its first work in this process."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")


def read_tokenizer(path: Path) -> bytes:
    """The bytes of a tokenizer.json.

    Raises:
        UserError: It cannot be read, or is too large to be one.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_TOKENIZER_BYTES + 1)
    except OSError as error:
        raise UserError(f"--tokenizer {path}: {error.strerror}. {HOW_TO_MAKE}") from None
    if len(content) > MAX_TOKENIZER_BYTES:
        raise UserError(f"--tokenizer {path}: larger than {MAX_TOKENIZER_BYTES >> 20} MiB, not a tokenizer.json. "
                        f"{HOW_TO_MAKE}")
    return content


def _end_of_text(path: str, vocabulary: dict[str, int], wanted: str) -> int:
    for candidate in [wanted] if wanted else END_OF_TEXT:
        if candidate in vocabulary:
            return vocabulary[candidate]
    tried = repr(wanted) if wanted else ", ".join(END_OF_TEXT)
    raise UserError(f"--tokenizer {path}: no end-of-text token; looked for {tried}. Name the one that ends a document "
                    "with --end_of_text.")
