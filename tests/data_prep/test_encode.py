"""Encoding: every document once, in its split, for any kind of input. See test_encode_ranks.py for several ranks."""

import json
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI

from data_prep import _job
from data_prep.encode import Settings, encode
from mpilm.data import _shardfile
from mpilm.data.shards import Dataset
from mpilm.lock import locked
from mpilm.log import UserError
from tests.data_prep.texts import PACKINGS, contents, decoded, jsonl, some, train, write
from tests.test_checkpoint_errors import small_disk

pytestmark = pytest.mark.serial
DOCUMENTS = some(300)
SMALL = Settings(validation=0.1, shard_mib=0.004, unit_mib=0.01)


@pytest.fixture
def tokenizer(tmp_path):
    return train(tmp_path, DOCUMENTS)


def alone(inputs, tokenizer, to, settings=SMALL, **options):
    """Encode on this rank by itself."""
    return encode(inputs, tokenizer, to, MPI.COMM_SELF, settings=settings, **options)


def all_of(folder):
    """The documents of both splits."""
    return decoded(folder) + decoded(folder, "validation")


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_document_once(tmp_path, tokenizer, kind, packing):
    source = write(tmp_path / "in", DOCUMENTS, kind, packing=packing)
    folder = alone([source], tokenizer, tmp_path / "out")
    assert sorted(all_of(folder)) == sorted(DOCUMENTS)
    assert 10 < len(decoded(folder, "validation")) < 60
    assert not (folder / "unfinished").exists()
    if kind != "txt":  # in the order of the input
        order = {text: number for number, text in enumerate(DOCUMENTS)}
        assert sorted(decoded(folder), key=order.__getitem__) == decoded(folder)


def test_kinds_do_not_change_tokens(tmp_path, tokenizer):
    """The same documents in the same order give the same dataset, bit for bit, whatever they came in."""
    found = [contents(alone([write(tmp_path / f"in-{kind}{packing}", DOCUMENTS, kind, packing=packing)], tokenizer,
                            tmp_path / f"out-{kind}{packing}"))
             for kind, packing in (("txt", ".zst"), ("jsonl", ""), ("parquet", ""))]
    assert all(other == found[0] for other in found)


def test_shards_are_few_and_of_one_size(tmp_path, tokenizer):
    source = write(tmp_path / "in", DOCUMENTS, "txt")
    one = alone([source], tokenizer, tmp_path / "one", Settings(validation=0))
    assert sorted(contents(one)) == ["index.json", "tokenizer.json", "train-00000.h5"]
    cut = Dataset.open(alone([source], tokenizer, tmp_path / "cut"))
    whole = Dataset.open(alone([source], tokenizer, tmp_path / "whole", Settings(validation=0.1)))
    assert [shard.tokens.size for shard in cut.shards[:-1]] == [int(0.004 * 2**20) // 2] * (len(cut.shards) - 1)
    assert np.array_equal(cut.read(0, cut.num_tokens), whole.read(0, whole.num_tokens))
    assert np.array_equal(cut.documents(0, cut.num_tokens), whole.documents(0, whole.num_tokens))


def test_the_split_goes_by_content(tmp_path, tokenizer):
    """Another order, other files, more documents: each document stays in its split, and so do its doubles."""
    write(tmp_path / "a", DOCUMENTS, "jsonl")
    write(tmp_path / "b", [*DOCUMENTS[::-1], *DOCUMENTS, "something new"], "txt")
    first, second = (alone([tmp_path / name], tokenizer, tmp_path / f"out-{name}") for name in "ab")
    assert set(decoded(first, "validation")) <= set(decoded(second, "validation"))
    assert not set(decoded(second)) & set(decoded(second, "validation"))


def test_long_documents_are_cut_without_a_trace(tmp_path, tokenizer):
    long = "\n".join(DOCUMENTS) * 10
    write(tmp_path / "in", [long, "short", long + "x"], "jsonl", files=1)
    (tmp_path / "in" / "z.txt").write_text(long)
    folder = alone([tmp_path / "in"], tokenizer, tmp_path / "out", Settings(validation=0, unit_mib=0.2))
    assert decoded(folder) == [long, "short", long + "x", long]


def test_a_lone_text_file_gets_a_validation_split(tmp_path, tokenizer):
    """What people have who come from nanoGPT: one input.txt."""
    text = "\n".join(DOCUMENTS)
    (tmp_path / "input.txt").write_text(text)
    folder = alone([tmp_path / "input.txt"], tokenizer, tmp_path / "out")
    assert decoded(folder) + decoded(folder, "validation") == ["".join(decoded(folder)), text[len(decoded(folder)[0]):]]
    assert 0.08 < len(decoded(folder, "validation")[0]) / len(text) < 0.12


def test_a_text_cannot_end_itself(tmp_path, tokenizer):
    write(tmp_path / "in", ["a <|endoftext|> b", "<|endoftext|>"], "txt")
    folder = alone([tmp_path / "in"], tokenizer, tmp_path / "out", Settings(validation=0))
    assert decoded(folder) == ["a <|endoftext|> b", "<|endoftext|>"]


def test_empty_documents_are_left_out(tmp_path, tokenizer, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(["", "x", None, ""]))
    (tmp_path / "in" / "b.txt").write_text("")
    folder = alone([tmp_path / "in"], tokenizer, tmp_path / "out", Settings(validation=0))
    assert decoded(folder) == ["x"]
    assert "left out: 4 empty documents" in capsys.readouterr().out


def test_no_documents_at_all(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.txt").write_text("")
    with pytest.raises(UserError, match="no documents in the input"):
        alone([tmp_path / "in"], tokenizer, tmp_path / "out")
    (tmp_path / "in" / "b.txt").write_text("now there is one")
    assert decoded(alone([tmp_path / "in"], tokenizer, tmp_path / "out", Settings(validation=0)))


def test_all_in_validation(tmp_path, tokenizer):
    write(tmp_path / "in", ["a", "b"], "jsonl")
    with pytest.raises(UserError, match=r"All 2 documents fell to the validation split.*smaller than 0\.99999"):
        alone([tmp_path / "in"], tokenizer, tmp_path / "out", Settings(validation=0.99999))


def test_too_few_for_validation(tmp_path, tokenizer, capsys):
    write(tmp_path / "in", ["a", "b"], "jsonl")
    alone([tmp_path / "in"], tokenizer, tmp_path / "out", Settings(validation=1e-9))
    assert "validation split is empty: too few (2 documents)" in capsys.readouterr().err


@pytest.mark.parametrize(("settings", "words"), [
    (Settings(validation=1.0), "--validation 1.0"), (Settings(validation=-0.1), "--validation -0.1"),
    (Settings(validation=float("nan")), "--validation nan"), (Settings(shard_mib=0), "--shard_mib 0"),
    (Settings(unit_mib=-1), "--unit_mib -1"), (Settings(end_of_text="<nope>"), "looked for '<nope>'"),
    (Settings(field="body"), "--field"),
])
def test_settings_that_make_no_sense(tmp_path, tokenizer, settings, words):
    write(tmp_path / "in", DOCUMENTS[:5], "jsonl")
    with pytest.raises(UserError, match=words):
        alone([tmp_path / "in"], tokenizer, tmp_path / "out", settings)


def test_a_second_call_has_nothing_to_do(tmp_path, tokenizer, capsys):
    write(tmp_path / "in", DOCUMENTS, "jsonl")
    folder = alone([tmp_path / "in"], tokenizer, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    alone([tmp_path / "in"], tokenizer, tmp_path / "out")
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_folder_that_holds_something_else(tmp_path, tokenizer):
    write(tmp_path / "in", DOCUMENTS, "jsonl")
    folder = alone([tmp_path / "in"], tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match=r"already holds a dataset.*--validation differs"):
        alone([tmp_path / "in"], tokenizer, folder, Settings(validation=0.5))
    with pytest.raises(UserError, match="--tokenizer differs"):
        alone([tmp_path / "in"], train(tmp_path / "other", DOCUMENTS[:9]), folder)
    write(tmp_path / "in", ["more"], "txt")
    with pytest.raises(UserError, match=r"changed input: .*000000\.txt"):
        alone([tmp_path / "in"], tokenizer, folder)
    (folder / "job.json").unlink()
    with pytest.raises(UserError, match="does not say from what"):
        alone([tmp_path / "in"], tokenizer, folder)


def test_two_at_a_time(tmp_path, tokenizer):
    write(tmp_path / "in", DOCUMENTS, "jsonl")
    (tmp_path / "out").mkdir(exist_ok=True)
    with locked(tmp_path / "out", wait_s=0, otherwise=""), pytest.raises(UserError, match="another process is writing"):
        alone([tmp_path / "in"], tokenizer, tmp_path / "out", wait_s=0.1)


def test_a_target_that_is_a_file(tmp_path, tokenizer):
    write(tmp_path / "in", DOCUMENTS, "jsonl")
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out: File exists"):
        alone([tmp_path / "in"], tokenizer, tmp_path / "out")


def test_the_index_says_what_is_there(tmp_path, tokenizer):
    write(tmp_path / "in", DOCUMENTS, "jsonl")
    index = json.loads((alone([tmp_path / "in"], tokenizer, tmp_path / "out") / "index.json").read_text())
    assert index["format"] == "mpilm-tokens"
    assert index["version"] == 1
    assert index["dtype"] == "<u2"
    assert sum(shard["num_documents"] for split in index["splits"].values() for shard in split) == 300


def test_a_bad_line_costs_nothing_that_was_done(tmp_path, tokenizer):
    """The remedy that is named goes on where it stopped."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(DOCUMENTS) + b"{no json\n")
    with pytest.raises(UserError, match="--bad_lines skip"):
        alone([tmp_path / "in"], tokenizer, tmp_path / "out")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "unfinished").glob("0*.json")}
    assert done
    skipping = replace(SMALL, bad_lines="skip")
    kept = []

    def keep(*args):
        kept.extend(path for path in done if path.exists() and path.stat().st_mtime_ns == done[path])
        return assemble(*args)
    assemble = _job.keep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_job, "keep", keep)
        folder = alone([tmp_path / "in"], tokenizer, tmp_path / "out", skipping)
    assert sorted(kept) == sorted(done)
    assert sorted(all_of(folder)) == sorted(DOCUMENTS)


def test_a_shard_that_is_gone(tmp_path, tokenizer):
    write(tmp_path / "in", DOCUMENTS, "jsonl")
    folder = alone([tmp_path / "in"], tokenizer, tmp_path / "out")
    (folder / "train-00001.h5").unlink()
    with pytest.raises(UserError, match=r"(?s)train-00001\.h5.*remove .*out; or restore the file"):
        alone([tmp_path / "in"], tokenizer, tmp_path / "out")


def test_a_disk_that_fills_up_with_shards(comm, tmp_path, tokenizer):
    """HDF5, which cannot close the file either, must not hide the reason."""
    write(tmp_path / "in", DOCUMENTS * 60, "jsonl")
    with small_disk(comm, tmp_path / "disk", "size=1m") as disk, pytest.raises(OSError, match="No space left") as told:
        _shardfile.write(disk / "train-00000.h5", {"num_tokens": 1 << 20}, [np.zeros(1 << 20, np.uint16)],
                         np.zeros(1, np.int64))
    assert told.value.filename.endswith("train-00000.h5.tmp")


@pytest.mark.parametrize(("room", "told"), [
    (0.5, r"disk: the disk is full, or your share of it: .* free\. When"),
    (1.5, r"disk: the disk is full, or your share of it: .* kB are free, and the shards still need .* kB\. When"),
])
def test_a_disk_that_is_too_small(comm, tmp_path, tokenizer, room, told):
    """For what is encoded, or for the shards, of which none is begun then. With more room the same command goes on."""
    large = Settings(shard_mib=0.1, unit_mib=0.1)
    write(tmp_path / "in", DOCUMENTS * 20, "jsonl")
    expected = Dataset.open(alone([tmp_path / "in"], tokenizer, tmp_path / "out", large))
    size = int(room * expected.num_tokens * expected.dtype.itemsize) + 8 * expected.num_documents
    with small_disk(comm, tmp_path / "disk", f"size={size}") as disk:
        with pytest.raises(UserError, match=told):
            alone([tmp_path / "in"], tokenizer, disk, large)
        assert not list(disk.glob("*.h5*"))
        subprocess.run(["mount", "-o", f"remount,size={6 * size}", str(disk)], check=True)
        assert Dataset.open(alone([tmp_path / "in"], tokenizer, disk, large)).fingerprint == expected.fingerprint


@pytest.mark.parametrize("name", ["a file", "a file/below", "long" * 100])
def test_an_output_folder_that_cannot_be(tmp_path, tokenizer, name):
    """Waiting for anything to be mended would not help."""
    write(tmp_path / "in", DOCUMENTS, "jsonl")
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match=r"(?s)^--to .*: (File exists|Not a directory|File name too long) .*Name a dir"):
        alone([tmp_path / "in"], tokenizer, tmp_path / name)


@pytest.mark.parametrize("name", ["unfinished/notes.txt", "job.json", "tokenizer.json"])
def test_what_is_somebody_elses_stays(tmp_path, tokenizer, name):
    """In the output folder, under a name of ours."""
    write(tmp_path / "in", DOCUMENTS, "jsonl")
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(UserError, match=f"{name} is there already"):
        alone([tmp_path / "in"], tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == "precious"
