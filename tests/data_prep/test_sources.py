"""INPUT as people name it: files, folders, globs; what counts and what does not."""

import gzip
import os

import pytest

from data_prep._sources import find
from mpilm.log import UserError

pytestmark = pytest.mark.serial


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a.py", "sub/c.jsonl.gz", "sub/d.parquet", "sub/e.TXT.zst", "Makefile", "__init__.py",
                 "picture.png", ".hidden.txt", ".git/f.txt", "_SUCCESS", "_metadata.parquet", ".part.crc", "data"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path / "in"


def names(sources):
    return [os.path.basename(source.path) for source in sources]


def test_a_folder(folder, capsys):
    found = find([folder])
    assert names(found) == ["Makefile", "__init__.py", "a.py", "b.txt", "c.jsonl.gz", "d.parquet", "e.TXT.zst"]
    assert [(source.kind, source.packing) for source in found][-3:] == [
        ("jsonl", "gzip"), ("parquet", ""), ("text", "zstd")]
    told = capsys.readouterr().out
    assert "skipping 3 files of other kinds" in told and all(f"1 {kind}" in told for kind in ("_*.parquet", ".png"))


def test_a_file_that_is_named_counts(folder):
    assert [source.kind for source in find([folder / "data", folder / ".hidden.txt"])] == ["text", "text"]


def test_globs(folder):
    assert names(find([f"{folder}/*.txt"])) == ["b.txt"]
    assert names(find([f"{folder}/**/*.gz"])) == ["c.jsonl.gz"]
    assert names(find([f"{folder}/s*"])) == ["c.jsonl.gz", "d.parquet", "e.TXT.zst"]


def test_named_twice_read_once(folder):
    os.symlink(folder / "b.txt", folder / "again.txt")
    assert names(find([folder / "b.txt", folder / "again.txt", f"{folder}/b.*"])) == ["b.txt"]


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_inputs_does_not_matter(folder, order):
    inputs = [folder / "sub", folder / "b.txt", folder / "a.py"][::order]
    assert names(find(inputs)) == ["a.py", "b.txt", "c.jsonl.gz", "d.parquet", "e.TXT.zst"]


def test_nothing_there(folder, tmp_path):
    for given in (tmp_path / "nowhere", f"{folder}/*.rs"):
        with pytest.raises(UserError, match="no such file or folder"):
            find([folder, given])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"No input files.*\.parquet"):
        find([tmp_path / "empty"])


def test_json_that_is_named_is_lines_of_json(folder):
    """As C4 and Dolma ship it; in a folder of source code it is something else."""
    (folder / "c4.json.gz").write_text("{}")
    assert [source.kind for source in find([f"{folder}/*.json.gz"])] == ["jsonl"]
    assert "c4.json.gz" not in names(find([folder]))


@pytest.mark.parametrize(("name", "content", "words"), [
    ("texts.tar", b"name" + b"\0" * 200, "NUL bytes"), ("a.jsonl.bz2", b"BZh91AY&SY...", "bzip2"),
    ("a.pdf", b"%PDF-1.7 ...", "PDF"), ("a.txt", "text".encode("utf-16"), "iconv"),
    ("texts.tar.gz", gzip.compress(b"name" + b"\0" * 200), "NUL bytes")])
def test_what_is_named_and_no_text(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        find([tmp_path / name])


def test_what_spark_has_not_finished(folder):
    """Nor what it leaves beside its files; a partition and a package of private modules are something else."""
    for name in ("_temporary/0/g.parquet", "_delta_log/h.parquet", "_year=2026/i.parquet", "_internal/j.py"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("x")
    found = names(find([folder]))
    assert {"g.parquet", "h.parquet"}.isdisjoint(found) and {"i.parquet", "j.py"} <= set(found)
    assert {"_SUCCESS", "_metadata.parquet"}.isdisjoint(names(find([f"{folder}/*"])))


def test_links_are_followed(folder, tmp_path):
    """Also in circles."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "k.txt").write_text("x")
    os.symlink(tmp_path / "elsewhere", folder / "more")
    os.symlink(folder, folder / "sub" / "back")
    assert names(find([folder])).count("k.txt") == 1
    os.symlink(tmp_path / "gone.txt", folder / "gone.txt")
    with pytest.raises(UserError, match="a link to something that is not there"):
        find([folder])


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(UserError, match="not an ordinary file"):
        find([tmp_path / "p.txt"])
