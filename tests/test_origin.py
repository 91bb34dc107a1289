"""`--run.resume never` and a path say where a run begins; the same command, and a job whose ranks die, go on."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from mpilm import options, origin, resume
from mpilm.checkpoint import Alone, Writer, retention
from mpilm.log import UserError
from tests import datasets
from tests.checkpoint_cases import cut, tensors, write
from tests.small_jobs import arguments, train_here

pytestmark = pytest.mark.serial


class Killed(BaseException):
    """In place of a SIGKILL: nothing that the program has catches it."""


@pytest.fixture
def saved(comm, tmp_path):
    """A run directory with checkpoints of steps 6 and 12."""
    write(tmp_path / "run" / "checkpoints", comm, [6, 12])
    return tmp_path / "run"


def begins(run, given, **changes):
    """Begin, or go on; the checkpoint that is read."""
    run.mkdir(exist_ok=True)
    config = config_of(run, given, **changes)
    reader = resume.find(config, OneRank())
    resume.make_way(config, reader, OneRank())
    return reader and reader.path


def config_of(run, given, **changes):
    """The configuration of a command."""
    return options.parse(arguments("data", run, **{"run.resume": given} | changes))


class OneRank(Alone):
    """As one rank of MPI's has it."""

    def bcast(self, value, root=0):
        return value


def save(comm, run, step, steps=99):
    """Another checkpoint of the run, which wants so many steps."""
    writer = Writer(run / "checkpoints", comm, keep_last=2)
    writer.save(step, cut(tensors(step), comm.rank, comm.size), {"config": {"run": {"steps": steps}}})
    writer.wait()


def names(folder):
    """What is there."""
    return sorted(path.name for path in folder.iterdir())


def test_after_a_death_the_abandoned_future_is_not_taken(comm, saved, capsys):
    first, again = saved / "checkpoints" / "step-00000006", f"{saved}/checkpoints/../checkpoints/step-00000006"
    assert begins(saved, first) == first
    assert names(saved / "checkpoints") == ["step-00000006", "step-00000012.abandoned"]
    assert begins(saved, again) == first, "nothing has been saved yet"
    save(comm, saved, 9)
    save(comm, saved, 12)
    assert begins(saved, first) == saved / "checkpoints" / "step-00000012", "the same command has gone on"
    assert not first.exists(), "retention may have removed what it began from"
    assert f"To begin again, give another --run.dir, or remove {saved / 'origin.json'}" in capsys.readouterr().out
    assert begins(saved, saved / "checkpoints" / "step-00000009") == saved / "checkpoints" / "step-00000009"
    assert names(saved / "checkpoints") == ["step-00000009", "step-00000012.abandoned", "step-00000012.abandoned-2"]


@pytest.mark.parametrize("given", ["never", "first"])
def test_what_has_finished_begins_again(comm, saved, given):
    first = saved / "checkpoints" / "step-00000006"
    given = first if given == "first" else given
    begins(saved, given)
    save(comm, saved, 20, steps=20)
    assert begins(saved, given) == (None if given == "never" else first)
    assert not (saved / "checkpoints" / "step-00000020").exists(), "put aside"


def test_a_checkpoint_of_another_run(comm, saved, tmp_path):
    run, given = tmp_path / "other", saved / "checkpoints" / "step-00000006"
    write(run / "checkpoints", comm, [3])
    assert begins(run, given) == given
    assert names(run) == ["checkpoints.old-1", "origin.json"]
    assert begins(run, given) == given
    save(comm, run, 8)
    shutil.rmtree(saved)
    assert begins(run, given) == run / "checkpoints" / "step-00000008"
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"saved nothing yet, but it is gone.*origin\.json"):
        begins(run, given)


def test_the_newest_of_a_run_that_goes_on_meanwhile(comm, saved, tmp_path):
    run = tmp_path / "other"
    assert begins(run, saved).name == "step-00000012"
    save(comm, saved, 18)
    assert begins(run, saved).name == "step-00000012", "without a checkpoint of its own: the one it began from"


def test_an_abandoned_one_is_read_where_it_is(comm, saved):
    begins(saved, saved / "checkpoints" / "step-00000006")
    save(comm, saved, 9)
    given = saved / "checkpoints" / "step-00000012.abandoned"
    assert begins(saved, given) == given
    assert retention.complete(saved / "checkpoints") == {}, "nobody knows whether it comes from these"
    assert given.is_dir()


def test_never_begins_once_and_another_command_begins_anew(comm, saved):
    assert begins(saved, "never") is None
    assert names(saved) == ["checkpoints.old-1", "origin.json"]
    save(comm, saved, 5)
    assert begins(saved, "never", **{"run.steps": 7, "run.time_limit_s": 3600}).name == "step-00000005"
    assert begins(saved, "never", **{"run.seed": 2}) is None
    assert names(saved) == ["checkpoints.old-1", "checkpoints.old-2", "origin.json"]
    assert begins(saved, "auto") is None
    assert names(saved) == ["checkpoints.old-1", "checkpoints.old-2"], "what comes now has no such origin"


def test_metrics_go_where_their_checkpoints_go(comm, saved, tmp_path):
    """A line of another run would be taken for one of this."""
    (saved / "metrics.jsonl").write_text('{"step": 1}\n')
    assert begins(saved, "never") is None
    assert names(saved) == ["checkpoints.old-1", "metrics.old-1.jsonl", "origin.json"]


def test_a_link_to_another_disk_stays(comm, saved, tmp_path):
    (saved / "checkpoints").rename(tmp_path / "scratch")
    (saved / "checkpoints").symlink_to(tmp_path / "scratch")
    assert begins(saved, "never") is None
    assert (saved / "checkpoints").resolve() == tmp_path / "scratch"
    assert not list((tmp_path / "scratch").iterdir()) and (tmp_path / "scratch.old-1").is_dir()
    (saved / "origin.json").unlink()
    (tmp_path / "scratch").rmdir()      # as a kill between the two leaves it
    assert begins(saved, "never") is None
    assert (tmp_path / "scratch").is_dir()


def test_another_spelling_is_the_same_command(comm, saved, tmp_path, monkeypatch):
    """Nor does it matter how many sequences fit in memory."""
    monkeypatch.chdir(tmp_path)
    assert begins(saved, "never", **{"data.path": "tokens"}) is None
    save(comm, saved, 5)
    again = {"data.path": f"{tmp_path}/./tokens", "data.micro_batch_size": 1}
    assert begins(saved, "never", **again).name == "step-00000005"


def test_what_it_began_from_is_spared(saved):
    first = saved / "checkpoints" / "step-00000006"
    begins(saved, first)
    assert origin.spared(config_of(saved, first)) == 6
    assert origin.spared(config_of(saved, "auto")) == origin.spared(config_of(saved, "never")) == -1


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100000, '{"command": 1, "checkpoint": 2}'])
def test_a_record_that_is_none(saved, text):
    (saved / "origin.json").write_text(text)
    assert begins(saved, "never") is None


def test_killed_between_two_renames(comm, saved, monkeypatch):
    given, rename = saved / "checkpoints" / "step-00000012", os.rename

    def once(source, target):
        rename(source, target)
        raise Killed

    write(saved / "checkpoints", comm, [12, 15, 18], keep_last=3)
    monkeypatch.setattr(retention.os, "rename", once)
    with pytest.raises(Killed):
        begins(saved, given)
    monkeypatch.undo()
    assert not (saved / "origin.json").exists()
    assert begins(saved, given) == given
    assert list(retention.complete(saved / "checkpoints")) == [12]


def test_what_cannot_be_read_moves_nothing(saved, tmp_path):
    shutil.copytree(saved / "checkpoints" / "step-00000006", tmp_path / "copy")
    next((tmp_path / "copy").glob("*.safetensors")).write_bytes(b"")
    before = names(saved / "checkpoints")
    for given in (tmp_path / "copy", tmp_path / "nowhere"):
        with pytest.raises(UserError):
            begins(saved, given)
    assert (names(saved / "checkpoints"), (saved / "origin.json").exists()) == (before, False)


def steps_of(path):
    """Of the lines of metrics."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_run_that_has_finished_and_one_that_begins_at_its_end(tmp_path):
    """The first begins again, beside what it did before; the second has nothing to do but to be there."""
    data, run = datasets.small(tmp_path / "data"), tmp_path / "run"
    for steps in (1, 2):
        train_here(data, run, **{"run.steps": steps, "run.resume": "never", "log.every": 1, "log.validate_every": 0})
    assert (steps_of(run / "metrics.jsonl"), steps_of(run / "metrics.old-1.jsonl")) == ([1, 2], [1])
    train_here(data, tmp_path / "copy", **{"run.steps": 2, "run.resume": run, "log.validate_every": 0})
    assert names(tmp_path / "copy" / "checkpoints") == ["step-00000002"]
