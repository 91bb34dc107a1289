"""INPUT as people name it: files, folders, globs; what counts and what does not."""

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
    assert "skipping 2 files of other kinds (1 .png" in capsys.readouterr().out.replace("1 without ending, ", "")


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
