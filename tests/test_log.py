"""What is told: by rank 0, to the terminal and the run directory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mpilm import log


def test_rank_0_talks_and_writes(tmp_path, capsys):
    log.setup(0, tmp_path / "run")
    log.say("hello 100 %")
    log.warn("careful")
    log.setup(0)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("hello 100 %\n", "warning: careful\n")
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO hello 100 %", "WARNING careful"]


def test_other_ranks_are_quiet(tmp_path, capsys):
    log.setup(3, tmp_path / "run")
    log.say("hello")
    log.warn("careful")
    log.setup(0)
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_a_second_run_appends(tmp_path):
    for text in ("first", "second"):
        log.setup(0, tmp_path)
        log.say(text)
    log.setup(0)
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


@pytest.mark.serial
def test_nobody_ends_for_want_of_a_terminal(tmp_path):
    """Full, or closed at the other end; it is said once where it can be."""
    program = f"from mpilm import log; log.setup(0, {str(tmp_path)!r}); [log.say('hello') for _ in range(9)]"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True,
                              check=False)
    assert (done.returncode, done.stderr) == (
        0, "warning: standard output: No space left on device. Nothing more is printed there.\n")
    assert (tmp_path / "log.txt").read_text().count("hello") == 9


@pytest.mark.serial
def test_a_character_that_cannot_be_shown_is_spelled(tmp_path):
    """And so is a line of progress."""
    program = ("from mpilm import log, progress; log.say('caf\u00e9 \U0001f600'); "
               "progress.Progress(9).update(1, '\u00e9')")
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONIOENCODING": "ascii"},
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "caf\\xe9 \\U0001f600\nstep 1/9  \\xe9\n"), done.stderr


@pytest.mark.serial
def test_a_log_that_was_removed_is_made_anew(tmp_path):
    """And what is told in another way is there too."""
    log.setup(0, tmp_path)
    log.say("before")
    (tmp_path / "log.txt").unlink()
    log.say("after")
    log.note("the end")
    log.setup(0)
    words = (tmp_path / "log.txt").read_text()
    assert "before" not in words and "after" in words and "the end" in words
