"""A file system that refuses: full, of the wrong kind, with garbage in it. Told in a sentence; nothing is lost."""

from __future__ import annotations

import json
import math

import pytest

from mpilm.failure import on_root
from mpilm.log import UserError
from mpilm.metrics import Metrics
from tests import datasets
from tests.small_jobs import arguments, train_here

# No file may grow beyond so many bytes, as on a full disk; not for MPI, which has its own files by then.
FULL = """
import resource, sys
size = int(sys.argv.pop(1))
from mpilm import launch, train
start = launch.greet
def full(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    start(*args)
launch.greet = full
launch.command(train.main)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small dataset."""
    return datasets.small(tmp_path_factory.mktemp("data"))


@pytest.mark.serial
@pytest.mark.parametrize(("size", "tensorboard"), [(0, "false"), (400, "true"), (5000, "false")])
def test_a_disk_that_fills_up_at_any_moment_is_told(run_mpi, data, tmp_path, size, tensorboard):
    """Configuration, metrics, events or checkpoint: whatever comes first."""
    program = tmp_path / "full.py"
    program.write_text(FULL)
    args = arguments(data, tmp_path / "run", **{"checkpoint.every": 1, "run.steps": 40, "log.every": 1,
                                                "log.tensorboard": tensorboard})
    result = run_mpi(0, [str(program), str(size), *args])
    assert result.rc == 2, result
    assert "File too large" in result.stderr and "Traceback" not in result.stderr, result.stderr


@pytest.mark.ranks(min=2, max=2)
@pytest.mark.parametrize(("name", "is_file"), [("checkpoints", True), ("metrics.jsonl", False), ("log.txt", False)])
def test_what_stands_in_the_way_is_named(comm, tmp_path_all, name, is_file):
    """A file where a directory should be, and the other way round."""
    place, data = tmp_path_all / "run" / name, tmp_path_all / "data"
    if comm.rank == 0:
        datasets.small(data)
        place.parent.mkdir()
        _ = place.write_text("mine") if is_file else place.mkdir()
    comm.Barrier()
    with pytest.raises(UserError, match=name):
        train_here(data, tmp_path_all / "run")


def test_garbage_among_the_metrics_is_left_out(tmp_path):
    """What is no line of ours does not come into the next run's file."""
    good = json.dumps({"step": 1, "loss": 2.0}) + "\n"
    garbage, deep = b"\xff\xfe\x00\n", b"[" * 100000 + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(garbage + good.encode() + b"[1]\n{}\n" + deep + good[:9].encode())
    metrics = Metrics(tmp_path, step=5, steps=9, tensorboard=False)
    metrics.open()
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == good


def test_a_loss_that_is_no_number_is_null_in_json(tmp_path):
    """NaN and infinity are not JSON, and other programs' readers stop there."""
    metrics = Metrics(tmp_path, step=0, steps=9, tensorboard=False)
    metrics.open()
    values = {"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5, "tokens_per_s": 1.0, "mfu": 0.0}
    metrics.record(values)
    metrics.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == values | {"loss": None, "grad_norm": None}


def test_an_oserror_on_root_is_a_mistake_of_all(comm, tmp_path_all):
    """Every rank raises the same."""
    with pytest.raises(UserError, match="none: No such file"):
        on_root(comm, (tmp_path_all / "none").read_text)
