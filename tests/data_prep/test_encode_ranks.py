"""Encoding on any number of ranks, killed or not, gives the same bytes."""

import json
import os
import random
import subprocess
import time

import pytest
from mpi4py import MPI

from data_prep import _parts
from data_prep.encode import Settings, encode
from mpilm.log import UserError
from tests import helpers
from tests.data_prep.texts import contents, jsonl, some, train, write

DOCUMENTS = some(300)
SMALL = Settings(validation=0.1, shard_mib=0.004, unit_mib=0.01)
OPTIONS = ["--validation", "0.1", "--shard_mib", "0.004", "--unit_mib", "0.01"]


def prepare(folder):
    """Inputs and a tokenizer in a folder; what one rank makes of them in `alone`."""
    write(folder / "in", DOCUMENTS, "jsonl", files=5)
    write(folder / "in" / "more", DOCUMENTS[:40], "txt")
    tokenizer = train(folder, DOCUMENTS)
    encode([folder / "in"], tokenizer, folder / "alone", MPI.COMM_SELF, settings=SMALL)


def command(folder, to):
    """The arguments of the same encoding as a program."""
    return ["-m", "data_prep.encode", str(folder / "in"), "--tokenizer", str(folder / "tokenizer.json"),
            "--to", str(to), *OPTIONS]


def test_these_ranks(comm, tmp_path_all):
    """All ranks of the test together write what rank 0 writes alone."""
    if comm.rank == 0:
        prepare(tmp_path_all)
    comm.Barrier()
    folder = encode([tmp_path_all / "in"], tmp_path_all / "tokenizer.json", tmp_path_all / "together", comm,
                    settings=SMALL)
    helpers.everywhere(comm, contents(folder) == contents(tmp_path_all / "alone"), "the shards differ")
    helpers.everywhere(comm, len(contents(folder)) > 5, "too few shards to tell")


def test_an_error_that_all_ranks_see(comm, tmp_path_all):
    tokenizer = tmp_path_all / "tokenizer.json"
    with pytest.raises(UserError, match="No such file"):
        encode([tmp_path_all], tokenizer, tmp_path_all / "out", comm, settings=SMALL)
    if comm.rank == 0:
        prepare(tmp_path_all)
        (tmp_path_all / "empty.txt").write_text("")
    comm.Barrier()
    with pytest.raises(UserError, match="no such file or folder"):
        encode([tmp_path_all / "nothing"], tokenizer, tmp_path_all / "out", comm, settings=SMALL)
    with pytest.raises(UserError, match="no documents in the input"):
        encode([tmp_path_all / "empty.txt"], tokenizer, tmp_path_all / "out", comm, settings=SMALL)


@pytest.mark.serial
@pytest.mark.parametrize("ranks", [0, 3])
def test_as_a_program(tmp_path, run_mpi, ranks):
    prepare(tmp_path)
    result = run_mpi(ranks, command(tmp_path, tmp_path / "out"))
    assert result.rc == 0, result.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert "train: " in result.stdout
    assert "\x1b" not in result.stdout, "a progress bar in a log"
    assert run_mpi(ranks, ["-m", "data_prep.verify", str(tmp_path / "out")]).rc == 0


@pytest.mark.serial
def test_a_bad_line_ends_all_ranks(tmp_path, run_mpi):
    prepare(tmp_path)
    (tmp_path / "in" / "zz.jsonl").write_bytes(jsonl(["fine"]) + b"{broken\n")
    result = run_mpi(2, command(tmp_path, tmp_path / "out"), timeout=60)
    assert result.rc == 2
    assert "zz.jsonl, at byte" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.serial
def test_help_is_quick():
    for name in ("tokenizer", "encode", "verify"):
        result = helpers.run_nested(0, ["-X", "importtime", "-m", f"data_prep.{name}", "--help"])
        assert result.rc == 0
        assert "python -m data_prep" in result.stdout
        for module in ("numpy", "mpi4py.MPI", "h5py", "tokenizers", "pyarrow"):
            assert f" {module}\n" not in result.stderr


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.serial
def test_ended_between_any_two_steps(tmp_path, monkeypatch):
    """The process ends just before, or just after, the n-th file gets its name, for every n."""
    prepare(tmp_path)
    replace, wanted = os.replace, contents(tmp_path / "alone")
    inputs, tokenizer = [tmp_path / "in"], tmp_path / "tokenizer.json"
    for n in range(0, 100, 3):
        left = [n]

        def end_at(source, target, left=left, after=n % 2):
            left[0] -= 1
            if left[0] < 0 and not after:
                raise Killed
            replace(source, target)
            if left[0] < 0:
                raise Killed

        monkeypatch.setattr(os, "replace", end_at)
        finished = True
        try:
            encode(inputs, tokenizer, tmp_path / f"out-{n}", MPI.COMM_SELF, settings=SMALL)
        except Killed:
            finished = False
        monkeypatch.setattr(os, "replace", replace)
        encode(inputs, tokenizer, tmp_path / f"out-{n}", MPI.COMM_SELF, settings=SMALL)
        assert contents(tmp_path / f"out-{n}") == wanted
        if finished:
            assert n > 20
            return
    raise AssertionError("it never came to its end")


@pytest.mark.serial
def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    prepare(tmp_path)
    done, write_json = [], _parts.write_json

    def counting(path, value):
        if len(done) == 4:
            raise Killed
        done.append(path.name)
        write_json(path, value)

    monkeypatch.setattr(_parts, "write_json", counting)
    with pytest.raises(Killed):
        encode([tmp_path / "in"], tmp_path / "tokenizer.json", tmp_path / "out", MPI.COMM_SELF, settings=SMALL)
    done.append("the kill")
    encode([tmp_path / "in"], tmp_path / "tokenizer.json", tmp_path / "out", MPI.COMM_SELF, settings=SMALL)
    assert len(set(done)) == len(done) > 6


def number_of_files(folder):
    """Files below a folder, which may come and go meanwhile."""
    return sum(len(names) for _, _, names in os.walk(folder))


def start_and_kill(args, folder, files):
    """Run on two ranks until so many more files have appeared, then kill every process; True if it ended before."""
    process = helpers.start(2, args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begin = number_of_files(folder)
    while process.poll() is None and number_of_files(folder) < begin + files:
        time.sleep(0.001)
    helpers.kill(helpers.descendants(process.pid))
    return process.wait() == 0


@pytest.mark.serial
@pytest.mark.slow
def test_killed_again_and_again(tmp_path, run_mpi):
    prepare(tmp_path)
    draw, to = random.Random(3), tmp_path / "out"
    for _ in range(6):
        if start_and_kill(command(tmp_path, to), to, draw.randint(1, 25)):
            break
    result = run_mpi(3, command(tmp_path, to))
    assert result.rc == 0, result.stderr
    assert contents(to) == contents(tmp_path / "alone")


@pytest.mark.serial
def test_a_resumed_run_notices_what_changed(tmp_path, monkeypatch):
    prepare(tmp_path)
    monkeypatch.setattr("data_prep._assemble.Assembly.write", raise_killed)
    with pytest.raises(Killed):
        encode([tmp_path / "in"], tmp_path / "tokenizer.json", tmp_path / "out", MPI.COMM_SELF, settings=SMALL)
    (tmp_path / "in" / "000.jsonl").write_bytes(jsonl(["another text"]))
    with pytest.raises(UserError, match=r"not finished.*changed input: .*000\.jsonl.*remove"):
        encode([tmp_path / "in"], tmp_path / "tokenizer.json", tmp_path / "out", MPI.COMM_SELF, settings=SMALL)
    records = sorted((tmp_path / "out" / "unfinished").glob("[0-9]*.json"))
    assert len(records) > 5
    assert json.loads(records[0].read_text())["unit"] == 0


def raise_killed(*_):
    """End here."""
    raise Killed


@pytest.mark.serial
def test_a_part_that_was_damaged_meanwhile_is_done_again(tmp_path, monkeypatch):
    prepare(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("data_prep._assemble.Assembly.write", raise_killed)
        with pytest.raises(Killed):
            encode([tmp_path / "in"], tmp_path / "tokenizer.json", tmp_path / "out", MPI.COMM_SELF, settings=SMALL)
    parts = tmp_path / "out" / "unfinished"
    (parts / "000001.train.tokens").write_bytes(b"cut")
    (parts / "000002.train.documents").unlink()
    (parts / "000003.json").write_text("{")
    folder = encode([tmp_path / "in"], tmp_path / "tokenizer.json", tmp_path / "out", MPI.COMM_SELF, settings=SMALL)
    assert contents(folder) == contents(tmp_path / "alone")
