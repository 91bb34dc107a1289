"""`python -m mpilm.inspect`: what it prints, and what it says when there is nothing good."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mpilm import inspect
from mpilm.checkpoint import newest, weights_sha256
from tests.checkpoint_cases import write


@pytest.fixture
def run(comm, tmp_path_all):
    """A run directory with checkpoints of the steps 1 and 2."""
    write(tmp_path_all / "checkpoints", comm, [1, 2])
    comm.Barrier()
    return tmp_path_all


def test_a_run_and_its_newest_checkpoint_are_the_same(run, comm, capsys):
    shown = []
    for path in (run, run / "checkpoints", run / "checkpoints" / "step-00000002"):
        assert inspect.main([str(path), "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1] == shown[2]
    assert shown[0]["step"] == 2
    assert shown[0]["parameters"] == 61 * 8 + 8 + 1
    assert shown[0]["weights_sha256"] == weights_sha256(newest(run / "checkpoints", comm))
    assert shown[0]["ranks"] == comm.size
    assert shown[0]["meta"] == {"note": "step 2"}


def test_lines_for_a_person(run, capsys):
    assert inspect.main([str(run / "checkpoints" / "step-00000001")]) == 0
    shown = capsys.readouterr().out
    for words in ("step            1\n", "parameters      497\n", "written         by ", "note            step 1\n"):
        assert words in shown


def test_what_a_run_says_about_itself_is_laid_out():
    about = {"path": "p", "step": 1, "parameters": 2, "weights_sha256": "0", "tensors": 3, "ranks": 1, "files": 2,
             "bytes": 0, "meta": {"layout": {"dp": 2, "pp": 1}, "config": {"run": {"seed": 1}, "model": {"layers": 6}}}}
    assert inspect.text(about).splitlines()[-4:] == [
        "written         by 1 rank into 2 files", "layout          dp 2, pp 1",
        "config.run      seed 1", "config.model    layers 6"]


def test_a_damaged_checkpoint_is_told_beside_the_json(run, comm, capsys):
    if comm.rank == 0:
        next((run / "checkpoints" / "step-00000002").glob("rank*")).unlink()
    comm.Barrier()
    assert inspect.main([str(run), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["step"] == 1
    assert comm.rank > 0 or "step-00000002" in shown.err
    assert inspect.main([str(run / "checkpoints" / "step-00000002"), "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "is missing" in shown.err


def test_nothing_there(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    for path, words in ((tmp_path / "typo", "no such directory"), (tmp_path, "no checkpoint there yet")):
        assert inspect.main([str(path)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.serial
def test_neither_torch_nor_mpi_is_needed(run):
    program = ("import sys; from mpilm import inspect; inspect.main(sys.argv[1:]); "
               "sys.exit(any(name in sys.modules for name in ('torch', 'mpi4py', 'jsonargparse')))")
    done = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "mpilm.inspect", "--help"]
    assert "--json" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
