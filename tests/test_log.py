"""What is told: by rank 0, to the terminal and the run directory."""

from __future__ import annotations

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
