"""Long text -> pieces that are tokenized one by one, cut where a cut changes no token.

A text of gigabytes is never held as a whole. It is cut at a line end between two lines that neither end nor begin with
white space: byte-level BPE splits words there anyway, so the tokens are those of the uncut text. Where no such place
is near it is cut at any line end, and without one between two characters. Tokenizers that begin every text with a mark
of their own (SentencePiece's "▁") begin every piece with one.

Invariant: where a text is cut depends on its bytes and on the positions asked for, not on who reads which part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

PIECE_BYTES = 256 << 10
SEARCH_BYTES = 64 << 10
_CLEAN = re.compile(rb"[^\s]\n(?=[^\s])")
_SPACE = b" \t\r\n\v\f"


def cut_at_or_after(text: bytes, position: int) -> int:
    """The first place to cut `text` at or after `position` > 0; `text` goes on SEARCH_BYTES beyond, or ends before."""
    if position >= len(text):
        return len(text)
    window = position + SEARCH_BYTES
    clean = _CLEAN.search(text, max(0, position - 2), window)
    if clean:
        return clean.end()
    line = text.find(b"\n", position - 1, window)
    if line >= 0:
        return line + 1
    nearby = range(position, position + 4)
    return next((place for place in nearby if place >= len(text) or _begins_character(text[place])), position)


def cut_before(text: bytes, start: int, limit: int) -> int:
    """The last place to cut `text` in (start, limit], limit < len(text)."""
    line = place = text.rfind(b"\n", start, limit)
    while place > start and (text[place - 1] in _SPACE or text[place + 1] in _SPACE):
        place = text.rfind(b"\n", start, place)
    if place > start:
        return place + 1
    if line >= 0:
        return line + 1
    nearby = range(limit, max(limit - 4, start), -1)
    return next((place for place in nearby if _begins_character(text[place])), limit)


def _begins_character(byte: int) -> bool:
    return byte & 0xC0 != 0x80  # not a UTF-8 continuation byte


def pieces(text: bytes) -> Iterator[bytes]:
    """A text in pieces of at most PIECE_BYTES."""
    start = 0
    while len(text) - start > PIECE_BYTES:
        place = cut_before(text, start, start + PIECE_BYTES)
        yield text[start:place]
        start = place
    yield text[start:]


def stream_pieces(stream: BinaryIO, size: int | None = None, *, held: bytes = b"") -> Iterator[bytes]:
    """`held` and the next `size` bytes of a stream (all of them if None) in pieces, holding two pieces in memory."""
    while size is None or size > 0:
        block = stream.read(PIECE_BYTES if size is None else min(PIECE_BYTES, size))
        if not block:
            break
        size = None if size is None else size - len(block)
        held += block
        while len(held) > PIECE_BYTES:
            place = cut_before(held, 0, PIECE_BYTES)
            yield held[:place]
            held = held[place:]
    if held:
        yield held
