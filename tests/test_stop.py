"""A signal to one rank, or the time limit, ends all at one step, saved; the same command goes on to the same end.

Real jobs, where signals come to processes that start or end; in the test's own ranks, whoever it is that gets them.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from mpilm import allocation, asked, stop
from mpilm.checkpoint import Alone, Writer, newest
from mpilm.config import Checkpoint, Run
from mpilm.failure import EndError
from mpilm.log import UserError
from mpilm.model.shape import Shape
from mpilm.model.slices import Slices
from mpilm.saver import Saver
from tests import datasets, small_jobs
from tests.chaos.jobs import OPTIONS, Job, losses, weights
from tests.checkpoint_cases import write

serial = pytest.mark.serial
SERVERS = {"sync.kind": "parameter_server"}
SHAPE = Shape(layers=1, width=8, heads=2, vocab_size=4)
UNBOUNDED = SERVERS | {"sync.staleness": 1, "run.reproducible": "false"}


@pytest.fixture
def data(comm, tmp_path_all):
    """A dataset."""
    return datasets.for_all(comm, tmp_path_all / "data")


@serial
def test_a_signal_to_one_rank_stops_all_and_the_same_command_goes_on(data, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    small_jobs.train_here(data, whole, **OPTIONS)
    with Job(3, data, cut, **{"run.spares": 1}) as job:
        assert job.until_step(8), job.words.read_text()
        assert job.signal(2, signal.SIGTERM), "the spare"
        assert job.wait() == stop.AGAIN, job.words.read_text()
    assert "stopped because a rank got SIGTERM; saved" in job.words.read_text()
    last = int(weights(cut).split()[0])
    assert losses(cut)[-1][0] == last < losses(whole)[-1][0]
    small_jobs.train_here(data, cut, **OPTIONS)
    assert (weights(cut), losses(cut)) == (weights(whole), losses(whole))


@contextlib.contextmanager
def asked_at(step, directory, *, me):
    """A thread sends this process a signal once there are metrics of that step, if it is `me` who is to get one."""
    over, metrics = threading.Event(), directory / "metrics.jsonl"
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)      # it may come when the run has ended otherwise

    def send():
        while not over.wait(0.002):
            if metrics.exists() and metrics.read_text().count("\n") >= step:
                os.kill(os.getpid(), signal.SIGUSR1)
                return

    thread = threading.Thread(target=send)
    if me:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if me:
            thread.join()
        signal.signal(signal.SIGUSR1, before)


def on(ranks, *values, name):
    """A case for so many ranks."""
    return pytest.param(*values, id=name, marks=pytest.mark.ranks(min=ranks, max=ranks))


@pytest.mark.parametrize(("options", "rank"), [
    on(2, {"parallel.pp": 2}, 0, name="pipeline"), on(2, {"run.spares": 1}, 1, name="a spare"),
    on(3, SERVERS, 0, name="a server"), on(3, UNBOUNDED, 2, name="a worker with old parameters")])
def test_whoever_gets_it(comm, data, tmp_path_all, watch, options, rank):
    run, trains = tmp_path_all / "run", comm.rank < comm.size - options.get("run.spares", 0)
    ended = pytest.raises(EndError, match="got SIGUSR1; saved") if trains else contextlib.nullcontext()
    with watch(60), asked_at(8, run, me=comm.rank == rank), ended as end:
        small_jobs.train_here(data, run, **OPTIONS | options | {"run.steps": 100000})
    assert end is None or end.value.code == stop.AGAIN
    assert int(weights(run).split()[0]) >= 8


@serial
def test_no_moment_is_the_wrong_one(data, tmp_path):
    """Signals from before MPI starts until the process is gone: the exit code is that of a run that is saved."""
    with Job(2, data, tmp_path / "run", tuned=True) as job:
        assert job.until(lambda: heeds(job.ranks().get(1), signal.SIGUSR1)), job.words.read_text()
        while job.process.poll() is None:
            job.signal(1, signal.SIGUSR1)
            time.sleep(0.002)
        assert job.wait() == stop.AGAIN, job.words.read_text()
    assert "stopped because a rank got SIGUSR1; saved" in job.words.read_text()
    assert int(weights(tmp_path / "run").split()[0]) >= 2


def heeds(pid, number):
    """Whether there is this process and the signal would not end it: it has a handler for it."""
    if pid is None:
        return False
    found = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in found)


@pytest.mark.ranks(min=2, max=2)
def test_the_time_limit(data, tmp_path_all, watch):
    options = {"run.steps": 100000, "run.time_limit_s": 2, "run.stop_before_s": 1}
    with watch(60), pytest.raises(EndError, match="stopped because the time is up; saved") as end:
        small_jobs.train_here(data, tmp_path_all / "run", **OPTIONS | options)
    assert end.value.code == stop.AGAIN
    assert int(weights(tmp_path_all / "run").split()[0]) > 0


@serial
@pytest.mark.parametrize(("found", "why"), [(61, "the time is up"), (None, "the time is up"), (600, None)])
def test_what_a_clock_makes_of_it_puts_no_end_off(comm, monkeypatch, found, why):
    """Nor does a batch system that does not answer."""
    told = asked.Asked(Run(stop_before_s=60))
    monkeypatch.setattr(told, "limit", lambda *, again=False: (found and (lambda: found)) if again else (lambda: 59))
    ending = stop.Stop(comm, told)
    assert [ending.after_step(last=False), ending.after_step(last=False)] == [None, why]


@serial
def test_the_allocation_is_the_limit(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "2000000000")
    assert asked.Asked(Run()).limit()() == pytest.approx(2000000000 - time.time(), abs=5)


@serial
def test_a_clock_that_is_set_ends_no_job(monkeypatch):
    left = asked.Asked(Run(time_limit_s=100)).limit()
    monkeypatch.setattr(asked.time, "time", lambda: 4e9)
    assert left() == pytest.approx(100, abs=5)


@serial
def test_what_a_save_takes_is_known_from_the_checkpoint(comm, tmp_path):
    write(tmp_path / "c", comm, [6])
    reader = newest(tmp_path / "c", Alone())
    assert 0 < reader.write_s < 60
    saver = Saver(Writer(tmp_path / "c", comm), NoTensors(), Slices(SHAPE), comm, Checkpoint(), about={}, reader=reader)
    assert saver.save_s == reader.write_s


class NoTensors:
    """Holds nothing."""

    def runs(self, part, parts):
        return []


@serial
@pytest.mark.parametrize(("text", "wanted"), [("1-00:00:00", 86400), ("10:00", 600), ("1:00:00\n", 3600),
                                              ("UNLIMITED", None), ("", None), ("INVALID", None)])
def test_durations_of_slurm(text, wanted):
    assert allocation.seconds(text) == wanted


@serial
def test_what_qstat_says():
    text = "Job Id: 1.pbs\n    resources_used.walltime = 00:20:00\n    Resource_List.walltime = 02:00:00\n"
    assert allocation.pbs_left(text) == 6000
    assert allocation.pbs_left("Resource_List.walltime = 02:00:00") == 7200
    assert allocation.pbs_left("qstat: Unknown Job Id") is None


@serial
@pytest.mark.parametrize("names", ["KILL", "USR3", "USR1 TERM", "SIG_DFL"])
def test_what_is_no_signal(names):
    with pytest.raises(UserError, match=r"--run\.stop_signals .*: .* is no signal"):
        asked.numbers(names)


@serial
def test_signals_by_name():
    assert asked.numbers("usr1, SIGTERM") == [signal.SIGUSR1, signal.SIGTERM]
    assert asked.numbers("") == []
