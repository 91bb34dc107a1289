"""Whole runs with servers: saved, resumed, into allreduce and out of it; killed, they end at once and go on."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from mpilm import assemble, inspect, options
from mpilm.launch import session
from mpilm.log import UserError
from mpilm.metrics import Metrics
from mpilm.sync._server import Server
from tests import datasets, helpers, small_jobs
from tests.helpers import everywhere

STEPS, SECONDS = 6, 30
OPTIONS = {"run.steps": STEPS, "run.compile": "off", "run.precision": "fp32", "data.sequence_length": 32,
           "data.global_batch_size": 8, "data.micro_batch_size": 2, "model.layers": 1, "model.width": 32,
           "model.heads": 2, "optim.warmup_steps": 2, "log.every": 1, "log.validate_every": 3,
           "log.validation_sequences": 8, "log.tensorboard": "false", "checkpoint.every": 2, "checkpoint.keep_last": 9}
SERVERS = {"sync.kind": "parameter_server"}
ANYHOW = SERVERS | {"sync.staleness": "inf", "run.reproducible": "false"}


def arguments(data, directory, **changes):
    """As they are typed."""
    given = OPTIONS | {"data.path": data, "run.dir": directory} | changes
    return [text for key, value in given.items() for text in (f"--{key}", str(value))]


def train(comm, data, directory, **changes):
    """A run over all ranks, in process. What its metrics say of every step, and the final weights' digest."""
    with session(run_dir=directory) as world:
        assemble.program(options.parse(arguments(data, directory, **changes)), world).run()
        world.comm.Barrier()
    lines, about = comm.bcast(look(directory) if comm.rank == 0 else None)
    courses = [(line["step"], line["loss"], line["grad_norm"], line.get("validation_loss")) for line in lines]
    return courses, about["weights_sha256"], lines


def look(directory):
    """The metrics, and what there is to say of the newest checkpoint."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], inspect.describe(inspect.find(directory))


def forget(comm, directory, after):
    """Remove the checkpoints of later steps."""
    if comm.rank == 0:
        for path in (directory / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > after:
                shutil.rmtree(path)
    comm.Barrier()


@pytest.fixture
def data(comm, tmp_path_all):
    """A small dataset."""
    return datasets.for_all(comm, tmp_path_all / "data")


@pytest.mark.ranks(min=2, max=3)
def test_saved_and_resumed_with_servers_and_without(comm, data, tmp_path_all):
    """As many servers as can be, one, none, one: losses, norms, validation and weights of an undisturbed allreduce."""
    undisturbed = train(comm, data, tmp_path_all / "whole")[:2]
    run = tmp_path_all / "pieces"
    ways = [(0, SERVERS | {"sync.servers": comm.size - 1}), (2, {}), (4, SERVERS)]
    for begin, way in ways:
        forget(comm, run, begin) if begin else None
        everywhere(comm, train(comm, data, run, **way)[:2] == undisturbed, f"from {begin} on with {way}")


@pytest.mark.ranks(min=2, max=3)
def test_an_asynchronous_run_is_saved_and_goes_on(comm, data, tmp_path_all):
    """Every step is told once, staleness with it; at the end all of it has been done."""
    run, workers = tmp_path_all / "run", comm.size - 1
    train(comm, data, run, **ANYHOW, **{"sync.staleness_rule": "scale"})
    forget(comm, run, 4)
    courses, _, lines = train(comm, data, run, **ANYHOW)
    assert [step for step, *_ in courses] == list(range(1, STEPS + 1))
    assert lines[-1]["tokens"] == STEPS * 8 * 32
    assert lines[-1]["staleness_max"] <= 2 * (workers - 1) * STEPS
    assert sum(lines[-1]["staleness_histogram"].values()) == 2 * workers, "of two steps, after the resume"
    assert courses[-1][3] < courses[2][3], "it learned nothing"


@pytest.mark.ranks(min=2, max=2)
def test_what_servers_do_not_do_is_refused(comm, data, tmp_path_all):
    """In one sentence, on all ranks."""
    for change, words in [({"parallel.pp": 2}, "a whole model on each worker.*--parallel.pp may be 1"),
                          ({"sync.servers": 2}, "nobody would be left to train")]:
        with pytest.raises(UserError, match=words):
            train(comm, data, tmp_path_all / "run", **SERVERS, **change)


@pytest.mark.ranks(min=2, max=3)
def test_a_run_that_diverges_ends_for_servers_and_workers(comm, data, tmp_path_all, watch):
    """With the same words on all of them."""
    diverging = {"optim.lr": 1e30, "optim.warmup_steps": 0, "run.steps": 30, "run.max_skipped": 3}
    with watch(60), pytest.raises(UserError, match="3 times in a row") as error:
        train(comm, data, tmp_path_all / "run", **SERVERS, **diverging)
    everywhere(comm, len(set(comm.allgather(str(error.value)))) == 1, str(error.value))


def pid_of(rank, job):
    """The process of a rank of a job, or None while there is none."""
    names = {f"{name}={rank}".encode() for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK")}
    for pid in helpers.descendants(job.pid):
        try:
            if names & set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                return pid
        except OSError:
            continue
    return None


def saved(directory):
    """Steps of the complete checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in (directory / "checkpoints").glob("step-*"))


@pytest.mark.serial
@pytest.mark.slow
def test_a_killed_worker_or_server_ends_the_job_which_then_goes_on(tmp_path, capsys):
    """SIGKILL in the middle of steps: a non-zero exit code within seconds, and the newest checkpoint is a good one,
    from which one rank goes on too."""
    data, run = datasets.small(tmp_path / "data"), tmp_path / "run"
    forever = ["-m", "mpilm.train", *arguments(data, run, **ANYHOW, **{"run.steps": 10**6})]
    newest = 0
    for rank in (2, 0):
        job = helpers.start(3, forever, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + SECONDS
            while max(saved(run), default=0) < newest + 4:
                assert job.poll() is None and time.monotonic() < deadline, "it saves nothing"
                time.sleep(0.01)
            helpers.kill([pid_of(rank, job)])
            assert job.wait(timeout=SECONDS) != 0
        finally:
            helpers.kill(helpers.descendants(job.pid))
        newest = saved(run)[-1]
    small_jobs.train_here(data, run, **OPTIONS | {"run.steps": newest + 2})
    said = capsys.readouterr().out
    assert f"at step {newest}" in said and f"finished at step {newest + 2}" in said, said


@pytest.mark.ranks(min=2, max=2)
def test_the_last_checkpoint_waits_for_the_last_line(comm, data, tmp_path_all, monkeypatch):
    """Whoever finds it goes on behind it: a line that is not there would never come."""
    run, record, finish, seen = tmp_path_all / "run", Metrics.record, Server.finish, []

    def late(self, values):
        time.sleep(0.3)     # servers have long done what they have to do
        seen.append((run / "checkpoints" / f"step-{STEPS:08d}").exists())
        record(self, values)

    def written(self):
        time.sleep(0.1)     # by when the last save is on the disk, but for its name
        finish(self)

    monkeypatch.setattr(Metrics, "record", late)
    monkeypatch.setattr(Server, "finish", written)
    train(comm, data, run, **SERVERS)
    everywhere(comm, not any(seen), "it was there before")
    everywhere(comm, (run / "checkpoints" / f"step-{STEPS:08d}").exists())
