"""Cuts lose nothing, are the same whoever makes them, and change no token where there is a clean place."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep import _cutting
from data_prep._cutting import cut_at_or_after, cut_before, pieces, stream_pieces

pytestmark = pytest.mark.serial
TEXTS = st.text(st.sampled_from("ab \n\r\té漢🙂"), max_size=400).map(str.encode)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces of a few bytes, so that a short text has many."""
    monkeypatch.setattr(_cutting, "PIECE_BYTES", 40)
    monkeypatch.setattr(_cutting, "SEARCH_BYTES", 16)


@given(text=TEXTS)
def test_pieces_make_up_the_text(text):
    for cut in (list(pieces(text)), list(stream_pieces(io.BytesIO(text)))):
        assert b"".join(cut) == text
        assert all(len(piece) <= 40 for piece in cut)
        for piece in cut:
            piece.decode()  # no character is cut


@given(text=TEXTS, size=st.integers(0, 100), held=st.binary(max_size=90))
def test_a_stretch_of_a_stream(text, size, held):
    assert b"".join(stream_pieces(io.BytesIO(text), size, held=held)) == held + text[:size]


@given(text=TEXTS, places=st.lists(st.integers(1, 500), min_size=2, max_size=6))
def test_cuts_do_not_cross(text, places):
    cuts = [cut_at_or_after(text, place) for place in sorted(places)]
    assert cuts == sorted(cuts)
    for place, cut in zip(sorted(places), cuts, strict=True):
        assert min(place, len(text)) <= cut <= len(text)
        text[:cut].decode()


def test_where_it_cuts():
    text = b"one\n  two\nthree\n\nfour"
    assert cut_at_or_after(text, 1) == 10  # not before the indented line
    assert cut_at_or_after(text, 11) == 16  # no clean place left: any line end
    assert cut_at_or_after(text, 18) == 18
    assert cut_before(text, 0, 20) == 10
    assert cut_before(text, 10, 20) == 17
    assert cut_before(text, 17, 20) == 20
    assert cut_before("漢字".encode(), 0, 4) == 3
    assert cut_at_or_after("漢字".encode(), 1) == 3
    assert cut_at_or_after("漢字".encode(), 4) == 6


def test_bytes_that_are_no_characters():
    noise = b"\x80" * 200
    assert b"".join(pieces(noise)) == noise
    assert cut_at_or_after(noise, 5) == 5


def test_clean_cuts_change_no_token():
    """What one piece tokenizes to is what the pieces tokenize to, one after the other."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("a", "b"), ("Ġ", "a"), ("Ċ", "a")]
    vocab = {name: number for number, name in enumerate([*names, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "ab\nab a\n\n  ab\nab\n ab b\nb\n" * 30
    cut = [piece.decode() for piece in pieces(text.encode())]
    assert len(cut) > 10
    assert [token for piece in cut for token in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids
