"""SIGKILL of the whole job at any moment: the next start goes on, loses little, and ends the same."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests import datasets, helpers

EVERY = 3
OPTIONS = {"run.steps": 60, "run.compile": "off", "data.sequence_length": 32, "data.global_batch_size": 8,
           "data.micro_batch_size": 2, "model.layers": 2, "model.width": 64, "model.heads": 2, "log.every": 1,
           "log.validate_every": 0, "log.tensorboard": "false", "checkpoint.every": EVERY, "sync.collective": "shared"}


def command(data, directory):
    """The arguments of one training job."""
    options = OPTIONS | {"data.path": data, "run.dir": directory}
    return ["-m", "mpilm.train", *(text for key, value in options.items() for text in (f"--{key}", str(value)))]


def steps_done(directory):
    """Lines of the metrics so far."""
    path = directory / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def start_and_kill(args, directory, moment):
    """Start on two ranks; kill every process a moment after some more steps are done. Returns the steps then done."""
    begin = steps_done(directory)
    process = helpers.start(2, args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while steps_done(directory) < begin + 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(moment)
    done = steps_done(directory)
    helpers.kill(helpers.descendants(process.pid))
    process.wait()
    return done


@pytest.mark.serial
@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_undisturbed(run_mpi, tmp_path):
    """Random moments, checkpoints under way among them; weights and losses are those of a run that nobody killed."""
    draw = random.Random(7)
    data, killed, whole = datasets.small(tmp_path / "data"), tmp_path / "killed", tmp_path / "whole"
    for _ in range(3):
        done = start_and_kill(command(data, killed), killed, draw.uniform(0, 0.15))
        saved = (killed / "checkpoints").glob("step-*")
        newest = max((int(path.name.removeprefix("step-")) for path in saved), default=0)
        # One interval for what was not saved, one for the checkpoint that was being written.
        assert done - newest <= 2 * EVERY
    for directory in (killed, whole):
        result = run_mpi(2, command(data, directory))
        assert result.rc == 0, result.stderr
    assert json_lines(killed) == json_lines(whole)
    weights = [json.loads(run_mpi(0, ["-m", "mpilm.inspect", str(directory), "--json"]).stdout)["weights_sha256"]
               for directory in (killed, whole)]
    assert weights[0] == weights[1]
    assert not list(Path("/dev/shm").glob("*mpilm*"))


def json_lines(directory):
    """(step, loss) of every line."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]
