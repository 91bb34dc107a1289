"""Documents of every kind of file come out whole, in bounded pieces; what cannot be read is named."""

import contextlib
import json
import os
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from data_prep import _cutting, _readers
from data_prep._readers import read
from data_prep._sources import find
from data_prep._units import divide
from mpilm.log import UserError
from tests.data_prep.texts import PACKINGS, jsonl, parquet
from tests.test_checkpoint_errors import small_disk

pytestmark = pytest.mark.serial


def pieces(path, *, unit_bytes=1 << 20, notes=None, validation=0.0, skip_bad=False):
    """All pieces of a file, read as units of so many bytes."""
    notes = Counter() if notes is None else notes
    units = divide(find([path]), validation=validation, unit_bytes=unit_bytes)
    return [piece for unit in units for part in unit.parts
            for piece in read(part, notes=notes, scratch=path.parent, skip_bad=skip_bad)]


def documents(path, **options):
    """The documents of a file, put together from their pieces."""
    texts, open_text = [], None
    for piece in pieces(path, **options):
        assert piece.begins == (open_text is None), "pieces of two documents are mixed"
        open_text = (open_text or "") + piece.text
        if piece.ends:
            texts.append(open_text)
            open_text = None
    assert open_text is None, "the last document does not end"
    return texts


@pytest.fixture
def small(monkeypatch):
    """Pieces and searches of a few bytes."""
    for module in (_cutting, _readers):
        monkeypatch.setattr(module, "PIECE_BYTES", 64)
        monkeypatch.setattr(module, "SEARCH_BYTES", 16)
    monkeypatch.setattr(_readers, "HEAD_BYTES", 10)


TEXTS = ["one", "two\r\nlines ", "漢字 🙂 e\u0301\u200d\u2028", "\u0000", " \n", "\ufeff inside \ufeff", "a" * 1000,
         "line\n" * 100, "Ä" * 500]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_file_is_a_document(tmp_path, small, packing, text):
    path = tmp_path / f"x.txt{packing}"
    path.write_bytes(PACKINGS[packing](text.encode()))
    for unit_bytes in (10, 100, 10_000):
        assert documents(path, unit_bytes=unit_bytes) == [text.removeprefix("\ufeff")]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("kind", "write"), [("jsonl", jsonl), ("parquet", parquet)])
def test_records(tmp_path, small, packing, kind, write):
    path = tmp_path / f"x.{kind}{packing}"
    path.write_bytes(PACKINGS[packing](write([*TEXTS, "", None, *TEXTS])))
    for unit_bytes in (10, 100, 10_000):
        notes = Counter()
        assert documents(path, unit_bytes=unit_bytes, notes=notes) == TEXTS * 2
        assert notes == {"empty": 2}


def test_equal_documents_have_equal_keys(tmp_path):
    text = "the same\nwherever it stands" * 10_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(PACKINGS[".gz"](jsonl([text, "other"])))
    (tmp_path / "c.parquet").write_bytes(parquet([text]))
    (tmp_path / "d.txt").write_text(text, encoding="utf-8-sig")
    keys = {path.name: {piece.key for piece in pieces(path)} for path in sorted(tmp_path.iterdir())}
    assert len(keys["a.txt"]) == 1
    assert keys["a.txt"] == keys["d.txt"] == keys["c.parquet"] < keys["b.jsonl.gz"]
    assert len(keys["b.jsonl.gz"]) == 2


def test_a_lone_text_makes_two_documents(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("".join(f"line {number}\n" for number in range(1000)))
    for unit_bytes in (100, 1000, 1 << 20):
        first, second = documents(path, unit_bytes=unit_bytes, validation=0.1)
        assert first + second == path.read_text()
        assert first.endswith("\n") and 0.05 < len(second) / len(first + second) < 0.15


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_empty_files(tmp_path, packing, kind):
    for number, raw in enumerate([b"", PACKINGS[packing](b"")]):
        path = tmp_path / f"{number}.{kind}{packing}"
        path.write_bytes(raw)
        assert documents(path) == []


def test_a_byte_order_mark_alone_is_an_empty_document(tmp_path):
    (tmp_path / "x.txt").write_bytes("\ufeff".encode())
    notes = Counter()
    assert documents(tmp_path / "x.txt", notes=notes) == []
    assert notes == {"empty": 1}


def test_undecodable_bytes_are_replaced_and_counted(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"caf\xe9 \xff")
    (tmp_path / "y.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "\\ud83d half \\ude00"}\n'
                                       b'{"text": "\\ud83d\\ude00"}\n')
    notes = Counter()
    assert documents(tmp_path / "x.txt", notes=notes) == ["caf\ufffd \ufffd"]
    assert documents(tmp_path / "y.jsonl", notes=notes) == ["caf\ufffd", "\ufffd half \ufffd", "😀"]
    assert notes == {"undecodable": 3}


@pytest.mark.parametrize(("line", "words"), [
    (b"{not json}", "not a line of JSON"),
    (b'{"txt": "x", "id": 3}', "no field 'text' among 'txt', 'id'"),
    (b'["text"]', r"not a JSON object"),
    (b'{"text": 5}', "a value of type int"),
    (b'{"text": "cut o', "not a line of JSON"),
    (b"[" * 100_000, "not a line of JSON"),
    (b"9" * 10_000, "not a line of JSON"),
])
def test_lines_that_cannot_be_used(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(["fine"]) + line + b"\n")
    place = len(jsonl(["fine"]))
    with pytest.raises(UserError, match=rf"x\.jsonl, at byte {place}: .*{words}"):
        documents(path)


def test_blank_lines_and_no_last_line_end(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\n{"text": "a"}\r\n  \n{"text": "b"}')
    assert documents(tmp_path / "x.jsonl") == ["a", "b"]


def test_a_line_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(_readers, "LINE_BYTES", 100)
    (tmp_path / "x.jsonl").write_bytes(jsonl(["y" * 200]))
    with pytest.raises(UserError, match=r"x\.jsonl, at byte 0: a line of more than"):
        documents(tmp_path / "x.jsonl")


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_packed_file_that_is_cut_off(tmp_path, packing, kind):
    texts = [f"{number} {number ** 7}" for number in range(5000)]
    raw = {"txt": "\n".join(texts).encode(), "jsonl": jsonl(texts), "parquet": parquet(texts)}[kind]
    packed = PACKINGS[packing](raw)
    path = tmp_path / f"x.{kind}{packing}"
    for content in (packed[:-3], packed[:len(packed) // 2], b"not packed at all"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"x\.{kind}\{packing}: cannot be read to its end"):
            documents(path)


def test_packed_in_several_frames(tmp_path):
    for packing in (".gz", ".zst"):
        path = tmp_path / f"x.txt{packing}"
        path.write_bytes(PACKINGS[packing](b"one ") + PACKINGS[packing](b"two"))
        assert documents(path) == ["one two"]


def test_parquet_that_cannot_be_used(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 and nothing more PAR1")
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read"):
        documents(path)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), path)
    with pytest.raises(UserError, match="no column 'text' among 'body', 'n'"):
        documents(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="values of type int64, not text"):
        documents(path)


def test_parquet_types_that_hold_text(tmp_path):
    texts = pyarrow.array(["a", "b", "a"])
    for number, column in enumerate([texts.dictionary_encode(), texts.cast(pyarrow.large_string()),
                                     texts.cast(pyarrow.binary()), texts.cast(pyarrow.string_view())]):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        assert documents(path) == ["a", "b", "a"]


def test_damage_of_any_kind_is_told(tmp_path):
    """Arrow has errors that are nobody else's."""
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", "three"] * 20}), path)
    whole = path.read_bytes()
    for place in range(4, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1:])
        with contextlib.suppress(UserError):
            documents(path)


def test_a_full_disk_is_not_the_input_s_fault(comm, tmp_path):
    path = tmp_path / "x.parquet.gz"
    path.write_bytes(PACKINGS[".gz"](parquet([os.urandom(500_000).hex()])))
    with small_disk(comm, tmp_path / "disk", "size=100k") as disk, pytest.raises(OSError, match="No space") as told:
        [*read(divide(find([path]), validation=0)[0].parts[0], notes=Counter(), scratch=disk)]
    assert told.value.filename == str(disk)


def test_a_text_that_a_cut_moves_to_the_end_of_ends_once(tmp_path):
    """A long last line, and units that lie in it."""
    path = tmp_path / "x.txt"
    path.write_text("short\n" * 3 + "x" * 60_000)
    assert len(documents(path, unit_bytes=10_000)) == 1


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("before")
    part = divide(find([path]), validation=0)[0].parts[0]
    path.write_text("after that")
    with pytest.raises(UserError, match=r"x\.txt: changed while"):
        list(read(part, notes=Counter()))


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("many lines\n" * 200_000)
    part = divide(find([path]), validation=0)[0].parts[0]
    reading = read(part, notes=Counter())
    next(reading)
    os.truncate(path, 1_000_000)
    with pytest.raises(UserError, match=r"x\.txt: changed while"):
        list(reading)


def test_another_field(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"body": "b", "text": "t"}))
    part = divide(find([tmp_path / "x.jsonl"]), validation=0)[0].parts[0]
    assert [piece.text for piece in read(part, field="body", notes=Counter())] == ["b"]


def test_progress_adds_up(tmp_path):
    for name, raw in (("a.txt", b"x" * 700_000), ("b.jsonl.zst", PACKINGS[".zst"](jsonl(["y" * 1000] * 900))),
                      ("c.parquet", parquet(["z"] * 100))):
        path = tmp_path / name
        path.write_bytes(raw)
        for unit_bytes in (200_000, 1 << 20):
            told = []
            units = divide(find([path]), validation=0, unit_bytes=unit_bytes)
            for unit in units:
                for part in unit.parts:
                    list(read(part, notes=Counter(), advance=told.append))
            assert sum(told) == sum(unit.size for unit in units)
            assert min(told) >= 0


BAD = b'{"text": "fine"}\n{"text": broken}\n[1, 2]\n{"txt": 1}\n{"text": 5}\n{"text": null}\n\n{"text": "too"}\n{"text"'


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("unit_bytes", [7, 1 << 20])
def test_bad_lines_may_be_skipped_and_are_counted(tmp_path, packing, unit_bytes):
    path = tmp_path / f"x.jsonl{packing}"
    path.write_bytes(PACKINGS[packing](BAD))
    notes = Counter()
    assert documents(path, unit_bytes=unit_bytes, notes=notes, skip_bad=True) == ["fine", "too"]
    assert notes == {"empty": 1, f"bad lines in {path}": 5}
    with pytest.raises(UserError, match=r"at byte 17: not a line of JSON .* or leave such lines out with --bad_lines"):
        documents(path, unit_bytes=unit_bytes)
